"""Stage 1 as a function: a guided teacher becomes one model that takes the guidance weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.models import NetworkDenoiser, guidance_student, make_guidance
from diffdistill.sampling.generation import preview as previewed
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.weighting import make_weighting
from diffdistill.workflows import runs
from diffdistill.workflows.borrowing import borrowed
from diffdistill.workflows.levels import noise_levels_for

PREVIEW = {"w": 1.0, "num_steps": 16, "num_samples": 16}


def distill_guidance(
    teacher: Denoiser | runs.Path_,
    data: Any,
    *,
    w_range: Sequence[float] | float = (0.0, 4.0),
    out: runs.Path_ | Run | None = None,
    trainer: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    trajectories: float = 0.0,
    num_steps: int = 8,
    init: Denoiser | runs.Path_ | None = None,
    noise_levels: Mapping[str, Any] | None = None,
    weighting: str = "truncated_snr",
    lora: Mapping[str, Any] | None = None,
    preview: Mapping[str, Any] | None = PREVIEW,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    made_by: Callable[[Run], Mapping[str, Any]] | None = None,
) -> NetworkDenoiser:
    """Distil a classifier-free-guided teacher into one model that takes the guidance weight w (Meng et al. 2023).

    Args:
        teacher: a conditional model, or its name or path. It is given back as it was.
        data: as of `diffdistill.data.as_data`, or options of `load_data`.
        w_range: least and greatest w, or one number for a student of a single w.
        out: folder of the run, or a `Run`; the same call continues an interrupted run there. None keeps no files.
        trainer: settings of `TrainerConfig`, in place of those of `runs.TRAINER`.
        guidance: `name` and options of `models.make_guidance`, by default "cfg"; `weak` of "auto" is a model, or its
            name or path.
        trajectories: share of batches whose inputs are states of guided runs of the teacher in place of noisy data.
        num_steps: of these runs.
        init: a model of the student's architecture whose weights it begins with, by default the teacher's.
        noise_levels: as of `noise_levels_for`: by default "cosine" between the ends of the teacher's range.
        weighting: of the error on x0, as of `make_weighting`.
        lora: for networks of diffusers, options of `add_adapters`: train low-rank adapters alone.
        preview: options of the pictures drawn every `trainer["sample_every"]` updates, `w`, `num_steps`,
            `num_samples`; None for none.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        made_by: what the file says that made it, given the run; by default these arguments.

    Returns:
        The student, on the teacher's device, which at `sample` takes any w of its range in one evaluation a step.

    Raises:
        ValueError: a teacher that takes no condition or knows none that is empty, data that are not its own, or an
            option out of range.
    """
    teacher = runs.opened_model(teacher)
    if not teacher.conditional:
        raise ValueError("this teacher takes no condition, so that no w guides it: there is nothing to distil")
    if teacher.num_classes:
        teacher.null_condition(torch.zeros(1, dtype=torch.long))  # which says what is missing where it has none
    data = runs.opened_data(data, teacher)
    config = TrainerConfig.from_dict({**runs.TRAINER, **(trainer or {})})
    w: Any = (w_range, w_range) if isinstance(w_range, (int, float)) else tuple(w_range)
    if not isinstance(teacher, NetworkDenoiser):
        raise ValueError(f"a {type(teacher).__name__} has no network that a student could be a copy of")
    record = runs.recorded(
        "distill_guidance",
        teacher=teacher,
        data=data,
        w_range=w,
        guidance=guidance,
        trajectories=trajectories,
        num_steps=num_steps,
        init=None if init is None else runs.opened_model(init),
        trainer={**runs.TRAINER, **(trainer or {})},
        noise_levels=noise_levels,
        weighting=weighting,
        lora=lora,
    )
    levels = noise_levels_for(teacher, noise_levels)
    student = guidance_student(teacher, w)
    runs.initialize(student, init)
    if lora:
        from diffdistill.interop.diffusers import add_adapters

        add_adapters(student, **lora)
    with runs.opened_run(out, record, accept_changes=accept_changes) as run, borrowed(teacher):
        if not run.finished:
            device = device_of(teacher)
            chosen = dict(guidance or {"name": "cfg"})
            if "weak" in chosen:
                chosen["weak"] = runs.opened_model(chosen["weak"])
            objective = GuidanceDistillation(
                make_guidance(chosen.pop("name"), teacher, **chosen),
                student,
                noise_levels=levels,
                weighting=make_weighting(weighting, sigma_data=teacher.sigma_data),
                trajectories=trajectories,
                num_steps=num_steps,
            )
            pictures = None if preview is None else previewed(teacher, **preview)
            trained = Trainer(
                objective, data, config, run, on_samples=pictures, callbacks=callbacks, name="stage 1"
            ).train()
            runs.finish(trained, run, (made_by or runs.provenance_of(record))(run))
            assert isinstance(trained, NetworkDenoiser)
            return trained.to(device)
        finished = runs.finished_model(run, student)
        assert isinstance(finished, NetworkDenoiser)
        return finished
