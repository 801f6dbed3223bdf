"""Stage 2 as a function: a model of many steps becomes a model of few."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.models import NetworkDenoiser, load_denoiser
from diffdistill.progressive import methods
from diffdistill.progressive.methods import METHODS
from diffdistill.registry import choose
from diffdistill.sampling.generation import preview as previewed
from diffdistill.sampling.plans import schedule_for
from diffdistill.training import Run
from diffdistill.training.weighting import make_weighting
from diffdistill.workflows import runs
from diffdistill.workflows.borrowing import borrowed

PREVIEW = {"w": 1.0, "num_samples": 16}
SCHEDULE = {"name": "cosine", "sigma_min": 0.0}
STEPS = {"start_steps": 64, "last_steps": 4}
"""Of halving, where a call does not say others."""


def distill_steps(
    teacher: Denoiser | runs.Path_,
    data: Any,
    *,
    method: str = "halving",
    out: runs.Path_ | Run | None = None,
    trainer: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    weighting: str = "truncated_snr",
    lora: Mapping[str, Any] | None = None,
    preview: Mapping[str, Any] | None = PREVIEW,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    **options: Any,
) -> NetworkDenoiser:
    """Distil a model into one of few steps: by halving them again and again, or by a method of one round.

        distill_steps(teacher, data, start_steps=64, last_steps=4)
        distill_steps(teacher, data, method="trajectory", num_steps=4)

    Args:
        teacher: a model that takes the guidance weight, from `distill_guidance`, or one that is used without guidance;
            or its name or path. It is given back as it was.
        data: as of `diffdistill.data.as_data`, or options of `load_data`.
        method: "halving" (Salimans and Ho 2022; Meng et al. 2023), "trajectory", "consistency" or "flow_map".
        out: folder of the run, or a `Run`; the same call continues an interrupted run there. Each student of halving is
            kept in `out/stages/NNN/model.safetensors`, others in `out/model.safetensors`. None keeps no files.
        trainer: settings of `TrainerConfig`, of each stage, in place of those of `runs.TRAINER`.
        schedule: options of `make_schedule`, by default "cosine" from the teacher's sigma_max down to 0.
        weighting: of the error on x0, as of `make_weighting`.
        lora: for networks of diffusers, options of `add_adapters`: train low-rank adapters alone.
        preview: options of the pictures drawn every `trainer["sample_every"]` updates; None for none.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        options: of the method, see `progressive.methods`: of halving `start_steps` (64, a power of two), `last_steps`
            (4), `stages` (settings of the trainer for the student of so many steps) and `sampler` ("deterministic",
            "stochastic" or "encoder").

    Returns:
        The student, of halving the last one, on the teacher's device; it knows its own noise levels and sampler.

    Raises:
        ValueError: numbers of steps that a method does not lead to, data that are not the teacher's, or an option out
            of range.
        TypeError: an option that the method does not have.
    """
    teacher = runs.opened_model(teacher)
    arguments = {"schedule": schedule, "weighting": weighting, "lora": lora, "method": method, "options": options}
    options = {**(STEPS if method == "halving" else {}), **options}
    merged = {**runs.TRAINER, **(trainer or {})}
    data = runs.opened_data(data, teacher)
    record = runs.recorded("distill_steps", teacher=teacher, data=data, trainer=merged, **arguments)
    with runs.opened_run(out, record, accept_changes=accept_changes) as run:
        paths = distilled_files(
            teacher,
            data,
            run,
            method=method,
            options=options,
            trainer=merged,
            schedule=schedule,
            weighting=weighting,
            lora=lora,
            preview=preview,
            callbacks=callbacks,
            made_by=runs.provenance_of(record),
        )
        student = load_denoiser(paths[min(paths)], device=device_of(teacher), like=teacher)
    assert isinstance(student, NetworkDenoiser)
    return student


def distilled_files(
    teacher: Denoiser,
    data: Any,
    run: Run,
    *,
    method: str,
    options: Mapping[str, Any],
    trainer: Mapping[str, Any],
    schedule: Mapping[str, Any] | None = None,
    weighting: str = "truncated_snr",
    lora: Mapping[str, Any] | None = None,
    preview: Mapping[str, Any] | None = PREVIEW,
    callbacks: Sequence[Any] = (),
    made_by: Callable[[Run], Mapping[str, Any]] | None = None,
) -> dict[int, Path]:
    """As `distill_steps`, in a run, with all settings of the trainer; the file of each student by its steps.

    Args:
        teacher: as of `distill_steps`, like what is not named here.
        data: samples and conditions.
        run: the run.
        method: the method.
        options: of the method.
        trainer: settings of `TrainerConfig`.
        schedule: options.
        weighting: its name.
        lora: options.
        preview: options.
        callbacks: as of `Trainer`.
        made_by: what the files say that made them, given the run of a student.
    """
    data = runs.opened_data(data, teacher)
    choose("method", method, METHODS)
    if not isinstance(teacher, NetworkDenoiser):
        raise ValueError(f"a {type(teacher).__name__} has no network that a student could be a copy of")
    levels = SCHEDULE if schedule is None else schedule
    pictures = None  # of an encoder, which makes no samples to look at
    if preview is not None and options.get("sampler") != "encoder":
        pictures = previewed(teacher, **preview)
    with borrowed(teacher):
        first = teacher
        if lora:
            from diffdistill.interop.diffusers import add_adapters

            first = add_adapters(copy.deepcopy(teacher), **lora)
        return methods.distill(
            first,
            data,
            run,
            method=method,
            options=options,
            schedule=lambda num_steps: schedule_for(teacher, {"num_steps": num_steps, **levels}),
            weighting=make_weighting(weighting, sigma_data=teacher.sigma_data),
            trainer=trainer,
            on_samples=pictures,
            callbacks=callbacks,
            provenance=made_by,
        )
