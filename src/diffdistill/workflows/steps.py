"""Stage 2 as a function: a model of many steps becomes models of fewer and fewer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.models import NetworkDenoiser, load_denoiser
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.progressive.stage2 import encoder_grid
from diffdistill.sampling.generation import preview as previewed
from diffdistill.sampling.plans import schedule_for
from diffdistill.training.weighting import make_weighting
from diffdistill.workflows import runs
from diffdistill.workflows.borrowing import borrowed

PREVIEW = {"w": 1.0, "num_samples": 16}
SCHEDULE = {"name": "cosine", "sigma_min": 0.0}


def distill_steps(
    teacher: Denoiser | runs.Path_,
    data: Any,
    *,
    start_steps: int = 64,
    last_steps: int = 4,
    out: runs.Path_ | None = None,
    trainer: Mapping[str, Any] | None = None,
    stages: Mapping[Any, Mapping[str, Any]] | None = None,
    schedule: Mapping[str, Any] | None = None,
    sampler: Literal["deterministic", "stochastic", "encoder"] = "deterministic",
    weighting: str = "truncated_snr",
    lora: Mapping[str, Any] | None = None,
    preview: Mapping[str, Any] | None = PREVIEW,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    settings: Mapping[str, Any] | None = None,
    command: str = "diffdistill.distill_steps",
) -> NetworkDenoiser:
    """Halve the steps of a model again and again, each student the teacher of the next (Salimans and Ho 2022).

    Args:
        teacher: a model that takes the guidance weight, from `distill_guidance`, or one that is used without guidance;
            or its name or path. It is given back as it was.
        data: as of `diffdistill.data.as_data`, or options of `load_data`.
        start_steps: steps of the first teacher, a power of two.
        last_steps: steps of the last student.
        out: folder of the run; the same call continues an interrupted run there. Each student is kept in
            `out/stages/NNN/model.safetensors`. None keeps no files.
        trainer: settings of `TrainerConfig` for each stage, in place of those of `runs.TRAINER`.
        stages: settings that replace them for the student of so many steps.
        schedule: options of `make_schedule`, by default "cosine" from the teacher's sigma_max down to 0.
        sampler: what the students are for: the "deterministic" sampler, the "stochastic" one, or "encoder", from data
            to noise.
        weighting: of the error on x0, as of `make_weighting`.
        lora: for networks of diffusers, options of `add_adapters`: train low-rank adapters alone.
        preview: options of the pictures drawn every `trainer["sample_every"]` updates; None for none.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        settings: what the run keeps as its configuration, by default these arguments.
        command: what the files of the models say they were made by.

    Returns:
        The last student, on the teacher's device; it knows its own noise levels and sampler.

    Raises:
        ValueError: numbers of steps that halving does not lead to, data that are not the teacher's, or an option out of
            range.
    """
    teacher = runs.opened_model(teacher)
    data = runs.opened_data(data, teacher)
    if not isinstance(teacher, NetworkDenoiser):
        raise ValueError(f"a {type(teacher).__name__} has no network that a student could be a copy of")
    encoder = sampler == "encoder"  # which makes no samples to look at
    sigmas = schedule_for(teacher, {"num_steps": start_steps, **(SCHEDULE if schedule is None else schedule)})
    halving = Halving(
        sigmas=encoder_grid(sigmas, teacher.sigma_min) if encoder else sigmas,
        sampler=sampler,
        weighting=make_weighting(weighting, sigma_data=teacher.sigma_data),
        trainer={**runs.TRAINER, **(trainer or {})},
        stages=stages or {},
        last=last_steps,
    )
    record = runs.recorded(
        settings,
        teacher=teacher,
        data=data,
        start_steps=start_steps,
        last_steps=last_steps,
        trainer=trainer or {},
        stages=stages or {},
        schedule=schedule,
        sampler=sampler,
        weighting=weighting,
        lora=lora,
    )
    device = device_of(teacher)
    with runs.opened_run(out, record, accept_changes=accept_changes) as run, borrowed(teacher):
        first = teacher
        if lora:
            from diffdistill.interop.diffusers import add_adapters

            first = add_adapters(copy.deepcopy(teacher), **lora)
        paths = halve_steps(
            first,
            data,
            halving,
            run,
            on_samples=None if encoder or preview is None else previewed(teacher, **preview),
            callbacks=callbacks,
            provenance=runs.provenance_of(record, command),
        )
        student = load_denoiser(paths[last_steps], device=device, like=teacher)
    assert isinstance(student, NetworkDenoiser)
    return student
