"""The outer loop of stage 2: N steps become N / 2, down to 1, each student the teacher of the next."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffdistill.denoiser import Denoiser, Distilled
from diffdistill.distributed import rank
from diffdistill.models import NetworkDenoiser, load_denoiser, save_denoiser
from diffdistill.progressive.stage2 import STEPS, StepDistillation
from diffdistill.registry import choose
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.batches import MapData


@dataclass(frozen=True)
class Halving:
    """Settings of stage 2.

    Attributes:
        sigmas: the first teacher's grid, `[2**k + 1]` levels, down to 0 for samplers and to a positive level for
            encoders; each student keeps every second one of it.
        sampler: what the students are for: the deterministic N-step sampler, the stochastic one, or encoding.
        weighting: weight of the error on x0.
        trainer: settings of `TrainerConfig` for all stages.
        stages: settings that replace them in the stage of the student of so many steps, if there is one.
        last: the number of steps to stop at.
    """

    sigmas: Tensor
    sampler: Literal["deterministic", "stochastic", "encoder"]
    weighting: Callable[[Tensor], Tensor]
    trainer: Mapping[str, Any]
    stages: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    last: int = 1

    def __post_init__(self) -> None:
        start = len(self.sigmas) - 1
        if start < 2 or start & (start - 1):
            raise ValueError(f"start_steps must be a power of two and at least 2, but is {start}")
        possible = [start >> k for k in range(1, start.bit_length())]
        if self.last not in possible:
            raise ValueError(f"last_steps must be one of {', '.join(map(str, possible))}, but is {self.last}")
        choose("sampler", self.sampler, STEPS)(self.sigmas)
        for num_steps, settings in self.stages.items():
            if not str(num_steps).isdigit() or int(num_steps).bit_count() != 1:
                stages = ", ".join(map(str, self.students()))
                raise ValueError(f"stages.{num_steps} is never a stage: here they are {stages}")
            if not isinstance(settings, Mapping):
                raise ValueError(f"stages.{num_steps} must hold settings of the trainer, but is {settings!r}")

    def students(self) -> list[int]:
        """The numbers of steps of the students, in the order in which they are made."""
        n, numbers = (len(self.sigmas) - 1) // 2, []
        while n >= self.last:
            numbers.append(n)
            n //= 2
        return numbers

    def trainer_of(self, num_steps: int) -> TrainerConfig:
        """The settings of one stage."""
        changes = {int(n): values for n, values in self.stages.items()}
        return TrainerConfig.from_dict({**self.trainer, **changes.get(num_steps, {})})


def halve_steps(
    teacher: Denoiser,
    data: MapData,
    halving: Halving,
    run: Run,
    *,
    on_samples: Callable[[Any], Tensor] | None = None,
    callbacks: Sequence[Any] = (),
    provenance: Callable[[Run], Mapping[str, Any]] | None = None,
) -> dict[int, Path]:
    """Make every student, and return the file of each by its number of steps.

    Each stage is a run of its own in `run.path / "stages"`, so that an interrupted run continues inside its stage.

    Args:
        teacher: takes the guidance weight as an input, or none at all.
        data: images and their conditions.
        halving: the settings.
        run: the folder to write to.
        on_samples: as for `Trainer`.
        callbacks: as for `Trainer`; they are told of every stage.
        provenance: what to record with a student, given the run of its stage.
    """
    trainers = {num_steps: halving.trainer_of(num_steps) for num_steps in halving.students()}
    paths: dict[int, Path] = {}
    sigmas = halving.sigmas
    for num_steps, trainer in trainers.items():
        stage, steps = run.stage(f"{num_steps:03d}"), choose("sampler", halving.sampler, STEPS)(sigmas)
        sigmas = sigmas[::2]
        paths[num_steps] = stage.path / "model.safetensors"
        if not stage.finished:
            student = copy.deepcopy(teacher)
            # All parameters are trained, but for a network that says otherwise, such as one with adapters.
            getattr(getattr(student, "model", None), "unfreeze", student.requires_grad_)()
            student.distilled = Distilled(tuple(sigmas.tolist()), halving.sampler)
            objective = StepDistillation(
                teacher, student, steps=steps, weighting=halving.weighting, w_range=teacher.w_range
            )
            name = f"{num_steps} step{'s' * (num_steps > 1)}"
            model = Trainer(
                objective, data, trainer, stage, on_samples=on_samples, callbacks=callbacks, name=name
            ).train()
            if rank() == 0:
                assert isinstance(model, NetworkDenoiser)
                save_denoiser(model, paths[num_steps], provenance=provenance(stage) if provenance else None)
            stage.finish(["model.safetensors"])
            # What a stage held on the device, some of it in cycles, must not lie beside what the next one holds.
            teacher.to("cpu")
            del student, objective, model
            gc.collect()
        teacher = load_denoiser(paths[num_steps], like=teacher)
    if not run.finished:
        run.finish()
    return paths
