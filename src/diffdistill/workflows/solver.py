"""The training of a learned solver as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.learned import (
    LearnedSolver,
    Rescue,
    Task,
    initial_levels,
    load_predictor,
    make_learned,
    make_task,
    save_predictor,
    trained,
)
from diffdistill.models import guided
from diffdistill.training import NonFiniteLossError, Run, Trainer, TrainerConfig
from diffdistill.workflows import runs
from diffdistill.workflows.borrowing import borrowed

TRAINER: dict[str, Any] = {
    "updates": 79,
    "batch_size": 128,
    "learning_rate": 5e-3,
    "precision": "fp32",
    "checkpoint_every": 20,
    "log_every": 1,
}
"""Settings of the trainer that a call does not say: Adam on 10 000 trajectories (Zhou et al. 2024)."""
SCHEDULE = {"name": "polynomial"}
OBJECTIVE: dict[str, Any] = {"name": "stepwise", "teacher": {"name": "heun"}, "points": 1}
PREDICTOR_FILE = "predictor.safetensors"
LAST_GOOD = "last_good.safetensors"


def train_solver(
    model: Denoiser | runs.Path_,
    *,
    num_steps: int = 3,
    form: Literal["amed", "plugin", "steps"] = "amed",
    w: float | None = None,
    inner: Mapping[str, Any] | None = None,
    predictor: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    thresholding: str | None = None,
    objective: Mapping[str, Any] | None = None,
    out: runs.Path_ | Run | None = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    made_by: Callable[[Run], Mapping[str, Any]] | None = None,
) -> LearnedSolver:
    """Train a solver of few steps for a model, which itself is not changed (Zhou et al. 2024).

    Args:
        model: the denoiser, or its name or path; it is given back as it was.
        num_steps: intervals; AMED-Solver and plugin make two evaluations of each, one less with `inner["afs"]`.
        form: "amed" (AMED-Solver), "plugin" (AMED-Plugin around a solver) or "steps" (corrected steps of a solver).
        w: guidance weight to sample with.
        inner: options of the solver inside, as of `make_solver`, by default "ipndm"; for "amed", `afs` alone.
        predictor: `name`, "amed" (reads the bottleneck) or "table", and its bounds; by default "amed" where the model
            names a bottleneck.
        schedule: options of `make_schedule`, by default "polynomial" between the ends of the model.
        start: an analytic start, `sigma` and `statistics`.
        thresholding: "dynamic", of every prediction of x0, or None.
        objective: `name`, "stepwise" (as published) or "endpoint", and its options.
        out: folder of the run, or a `Run`; the same call continues an interrupted run there. None keeps no files.
        trainer: settings of `TrainerConfig`, in place of those of `TRAINER`.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        made_by: what the file says that made it, given the run; by default these arguments.

    Returns:
        The learned solver: `sample(model, 16, solver=learned)`, or `learned.solver` and `learned.sigmas`.

    Raises:
        NonFiniteLossError: training diverged; what was good last is `last_good.safetensors` in the folder of the run.
        ValueError, TypeError: options that do not fit each other or the model.
    """
    config = TrainerConfig.from_dict({**TRAINER, **(trainer or {})})
    model = runs.opened_model(model, device=config.device)
    denoiser = model if w is None else guided(model, w)
    ends = {"sigma_min": model.sigma_min, "sigma_max": model.sigma_max}
    given = {**ends, **(SCHEDULE if schedule is None else schedule), **({"sigma_max": start["sigma"]} if start else {})}
    named = {"name": "table" if model.bottleneck is None else "amed"} if not predictor else dict(predictor)
    solver = dict(inner or ({} if form == "amed" else {"name": "ipndm"}))
    record = runs.recorded(
        "train_solver",
        model=model,
        num_steps=num_steps,
        form=form,
        w=w,
        inner=solver,
        predictor=named,
        schedule=given,
        start=start,
        thresholding=thresholding,
        objective=objective,
        trainer={**TRAINER, **(trainer or {})},
    )
    with runs.opened_run(out, record, accept_changes=accept_changes) as run:
        path = run.path / PREDICTOR_FILE
        if run.finished:
            return load_predictor(path, device=device_of(model))
        sigmas, options = initial_levels(given, num_steps, named)
        learned = make_learned(
            form, inner=solver, predictor=options, start=start, thresholding=thresholding, sigmas=sigmas
        )
        with borrowed(model):
            model.to(device_of(config.device))
            task = make_task(learned, denoiser, given, **(OBJECTIVE if objective is None else objective))
            training = Trainer(task.objective, task.data, config, run, callbacks=callbacks, name=form)
            learned = _trained(training, learned, task, denoiser, made_by or runs.provenance_of(record))
        if rank() == 0:
            save_predictor(learned, path)
        run.finish([PREDICTOR_FILE], keep=1)
        return load_predictor(path, device=device_of(model))


def _trained(
    trainer: Trainer,
    learned: LearnedSolver,
    task: Task,
    denoiser: Denoiser,
    provenance: Callable[[Run], Mapping[str, Any]],
) -> LearnedSolver:
    """The trained solver; where training diverges, the solver of the last good checkpoint is written."""
    rescue, run = Rescue(learned, task, denoiser), trainer.run
    try:
        return trained(learned, trainer.train(), denoiser, provenance(run))
    except NonFiniteLossError as error:
        left, path = rescue.last_good(run, provenance(run)), run.path / LAST_GOOD
        if rank() == 0:
            save_predictor(left.learned, path)
        raise NonFiniteLossError(
            f"{error}; seed {trainer.config.seed}, step {left.step} to sigma = {left.sigma:.4g}; "
            f"the predictor after {left.update} updates is {path}",
            update=error.update,
        ) from None
