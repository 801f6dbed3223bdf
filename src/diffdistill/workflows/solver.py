"""The training of a learned solver as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.learned import LearnedSolver, load_predictor, make_learned, make_task, save_predictor, trained
from diffdistill.models import guided
from diffdistill.sampling.plans import schedule_for
from diffdistill.training import Trainer, TrainerConfig
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
    objective: Mapping[str, Any] | None = None,
    out: runs.Path_ | None = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    settings: Mapping[str, Any] | None = None,
    command: str = "diffdistill.train_solver",
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
        objective: `name`, "stepwise" (as published) or "endpoint", and its options.
        out: folder of the run; the same call continues an interrupted run there. None keeps no files.
        trainer: settings of `TrainerConfig`, in place of those of `TRAINER`.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        settings: what the run keeps as its configuration, by default these arguments.
        command: what the file of the solver says it was made by.

    Returns:
        The learned solver: `sample(model, 16, solver=learned)`, or `learned.solver` and `learned.sigmas`.

    Raises:
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
        settings,
        model=model,
        num_steps=num_steps,
        form=form,
        w=w,
        inner=solver,
        predictor=named,
        schedule=given,
        start=start,
        objective=objective,
        trainer=trainer or {},
    )
    with runs.opened_run(out, record, accept_changes=accept_changes) as run:
        path = run.path / PREDICTOR_FILE
        if run.finished:
            return load_predictor(path, device=device_of(model))
        learned = make_learned(
            form,
            inner=solver,
            predictor=named,
            start=start,
            sigmas=schedule_for(model, {**given, "num_steps": num_steps}),
        )
        with borrowed(model):
            model.to(device_of(config.device))
            task = make_task(learned, denoiser, given, **(OBJECTIVE if objective is None else objective))
            result = Trainer(task.objective, task.data, config, run, callbacks=callbacks, name=form).train()
            learned = trained(learned, result, denoiser, runs.provenance_of(record, command)(run))
        if rank() == 0:
            save_predictor(learned, path)
        run.finish([PREDICTOR_FILE])
        return load_predictor(path, device=device_of(model))
