"""Few-step students by any method of this room: one entry for scripts and for `diffdistill.distill_steps`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, Distilled
from diffdistill.distributed import rank, world_size
from diffdistill.models import NetworkDenoiser, flow_map_student, save_denoiser
from diffdistill.progressive.consistency import ConsistencyDistillation, ContinuousConsistency, fine_levels
from diffdistill.progressive.flow_map import FlowMapDistillation
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.progressive.stage2 import encoder_grid
from diffdistill.progressive.trajectory import TrajectoryDistillation
from diffdistill.registry import choose, construct
from diffdistill.solvers import make_solver
from diffdistill.training import Objective, Run, Trainer, TrainerConfig
from diffdistill.training.batches import MapData
from diffdistill.training.noise_levels import noise_levels_of

Schedule = Callable[[int], Tensor]
"""The noise levels of so many steps."""
Weighting = Callable[[Tensor], Tensor]
ANY_NUMBER = 0
"""Stands for the number of steps of a student that takes any."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Options of `method=trajectory` (`TrajectoryDistillation`).

    Attributes:
        num_steps: steps of the student.
        variable_steps: train one student, a flow map, for each of these numbers of steps in place of one.
        points: levels that the teacher has more in each of the student's intervals; the paper has 3.
        solver: of the teacher, options of `make_solver`.
        afs: take the student's first step analytically.
    """

    num_steps: int = 4
    variable_steps: Sequence[int] | None = None
    points: int = 3
    solver: Mapping[str, Any] = field(default_factory=lambda: {"name": "dpmpp", "order": 3})
    afs: bool = False

    def __post_init__(self) -> None:
        check_counts("variable_steps", self.counts)
        check_counts("points", [self.points], least=0)

    @property
    def counts(self) -> list[int]:
        """The numbers of steps of the student, the most first."""
        given = [self.num_steps] if self.variable_steps is None else list(self.variable_steps)
        return sorted(set(given), reverse=True) if all(type(n) is int for n in given) else given

    def student(self, teacher: NetworkDenoiser, schedule: Schedule) -> NetworkDenoiser:
        """What is trained, before it is."""
        grids = [tuple(schedule(n).tolist()) for n in self.counts]
        student = copy.deepcopy(teacher) if self.variable_steps is None else flow_map_student(teacher)
        student.distilled = Distilled(grids[0], afs=self.afs, others=tuple(grids[1:]))
        return student

    def objective(
        self, teacher: NetworkDenoiser, student: NetworkDenoiser, schedule: Schedule, weighting: Weighting
    ) -> Objective:
        """How it is trained; the weighting of the other methods has no place in its distance."""
        grids = [schedule(n) for n in self.counts]
        fine = [with_more(levels, self.points, schedule, scale=teacher.sigma_data) for levels in grids]
        return TrajectoryDistillation(
            teacher,
            student,
            grids=grids,
            fine=fine,
            solver=make_solver(**self.solver),
            afs=self.afs,
            w_range=teacher.w_range,
        )


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Options of `method=consistency` (`ConsistencyDistillation` and `ContinuousConsistency`).

    Attributes:
        num_steps: steps of the student, and segments of its trajectory.
        levels: "discrete", or "continuous" by a derivative.
        fine: with discrete levels, those in each segment at the beginning and at the end of the run.
        solver: of the teacher's hop, options of `make_solver`.
        error: "squared" or "huber".
        noise_levels: with continuous levels, options of `noise_levels_of`.
        warmup, normalise: with continuous levels, as for `ContinuousConsistency`.
    """

    num_steps: int = 4
    levels: Literal["discrete", "continuous"] = "discrete"
    fine: Sequence[int] = (2, 16)
    solver: Mapping[str, Any] = field(default_factory=lambda: {"name": "euler"})
    error: Literal["squared", "huber"] = "squared"
    noise_levels: Mapping[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    warmup: float = 0.3
    normalise: bool = True

    def __post_init__(self) -> None:
        check_counts("num_steps", [self.num_steps])
        choose("levels", self.levels, {"discrete": None, "continuous": None})

    def student(self, teacher: NetworkDenoiser, schedule: Schedule) -> NetworkDenoiser:
        """What is trained, before it is."""
        student = copy.deepcopy(teacher)
        student.distilled = Distilled(tuple(schedule(self.num_steps).tolist()))
        return student

    def objective(
        self, teacher: NetworkDenoiser, student: NetworkDenoiser, schedule: Schedule, weighting: Weighting
    ) -> Objective:
        """How it is trained."""
        shared: dict[str, Any] = {"sigmas": schedule(self.num_steps), "weighting": weighting, "error": self.error}
        shared["w_range"] = teacher.w_range
        if self.levels == "discrete":
            fine: Any = self.fine
            return ConsistencyDistillation(teacher, student, fine=fine, solver=make_solver(**self.solver), **shared)
        return ContinuousConsistency(
            teacher,
            student,
            noise_levels=noise_levels_of(teacher, self.noise_levels),
            warmup=self.warmup,
            normalise=self.normalise,
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class FlowMapStudent:
    """Options of `method=flow_map`, those of `FlowMapDistillation`; `noise_levels` are options of `noise_levels_of`."""

    form: Literal["eulerian", "lagrangian", "shortcut"] = "eulerian"
    anchors: float = 0.25
    to_zero: float = 0.15
    warmup: float = 0.3
    normalise: bool = True
    error: Literal["squared", "huber"] = "squared"
    noise_levels: Mapping[str, Any] = field(default_factory=lambda: {"name": "cosine"})

    def student(self, teacher: NetworkDenoiser, schedule: Schedule) -> NetworkDenoiser:
        """What is trained, before it is."""
        return copy.deepcopy(teacher) if teacher.flow_map else flow_map_student(teacher)

    def objective(
        self, teacher: NetworkDenoiser, student: NetworkDenoiser, schedule: Schedule, weighting: Weighting
    ) -> Objective:
        """How it is trained."""
        return FlowMapDistillation(
            teacher,
            student,
            noise_levels=noise_levels_of(teacher, self.noise_levels),
            weighting=weighting,
            w_range=teacher.w_range,
            error=self.error,
            form=self.form,
            anchors=self.anchors,
            to_zero=self.to_zero,
            warmup=self.warmup,
            normalise=self.normalise,
        )


@dataclass(frozen=True, kw_only=True)
class StepHalving:
    """Options of `method=halving` (`Halving`): steps of the first teacher and of the last student, and stages."""

    start_steps: int = 128
    last_steps: int = 1
    stages: Mapping[Any, Mapping[str, Any]] | None = None
    sampler: Literal["deterministic", "stochastic", "encoder"] = "deterministic"


METHODS: dict[str, Callable[..., Any]] = {
    "halving": StepHalving,
    "trajectory": Trajectory,
    "consistency": Consistency,
    "flow_map": FlowMapStudent,
}
"""The options of each method."""


def distill(
    teacher: NetworkDenoiser,
    data: MapData,
    run: Run,
    *,
    method: str = "halving",
    options: Mapping[str, Any],
    schedule: Schedule,
    weighting: Weighting,
    trainer: Mapping[str, Any],
    on_samples: Callable[[Any], Tensor] | None = None,
    callbacks: Sequence[Any] = (),
    provenance: Callable[[Run], Mapping[str, Any]] | None = None,
) -> dict[int, Path]:
    """Make few-step students, and return the file of each by its number of steps; 0 stands for any number.

    Args:
        teacher: a model of stage 1, or one that takes no guidance weight.
        data: images and their conditions; of trajectories their conditions alone are used.
        run: the folder to write to; it is continued.
        method: one of `METHODS`.
        options: of the method.
        schedule: the noise levels of so many steps.
        weighting: weight of the error on x0.
        trainer: settings of `TrainerConfig`.
        on_samples: as for `Trainer`.
        callbacks: as for `Trainer`.
        provenance: what to record with a student, given its run.

    Raises:
        ValueError: an unknown method, options out of range, a teacher or a trainer that the method cannot work with.
        TypeError: an option that the method does not have.
    """
    chosen = construct("method", method, METHODS, **options)
    if teacher.distilled is not None:
        raise ValueError(
            f"the teacher is a student of {teacher.distilled.num_steps} steps already: give the model of stage 1"
        )
    if isinstance(chosen, StepHalving):
        sigmas = schedule(chosen.start_steps)
        halving = Halving(
            sigmas=encoder_grid(sigmas, teacher.sigma_min) if chosen.sampler == "encoder" else sigmas,
            sampler=chosen.sampler,
            weighting=weighting,
            trainer=trainer,
            stages=chosen.stages or {},
            last=chosen.last_steps,
        )
        return halve_steps(
            teacher, data, halving, run, on_samples=on_samples, callbacks=callbacks, provenance=provenance
        )
    config = TrainerConfig.from_dict(trainer)
    student = chosen.student(teacher, schedule)
    path = run.path / "model.safetensors"
    found = {ANY_NUMBER if student.distilled is None else student.distilled.num_steps: path}
    if run.finished:
        return found
    unfreeze = getattr(student.model, "unfreeze", student.requires_grad_)
    unfreeze()  # all parameters, but for a network that says otherwise, such as one with adapters
    objective = chosen.objective(teacher, student, schedule, weighting)
    if getattr(objective, "forward_mode", False) and config.parallel == "fsdp" and world_size() > 1:
        raise ValueError(
            "trainer.parallel=fsdp: split parameters have no derivatives in forward mode, which this method takes; "
            "choose ddp, or a method without them: halving, trajectory, consistency"
        )
    own = data if not isinstance(objective, TrajectoryDistillation) or needs_data(teacher) else None
    model = Trainer(objective, own, config, run, on_samples=on_samples, callbacks=callbacks, name=method).train()
    if rank() == 0:
        assert isinstance(model, NetworkDenoiser)
        save_denoiser(model, path, provenance=provenance(run) if provenance else None)
    run.finish(["model.safetensors"])
    return found


def needs_data(teacher: Denoiser) -> bool:
    """Whether the conditions of a teacher can be read from data alone: they are no class labels."""
    return teacher.conditional and not teacher.num_classes


def with_more(levels: Tensor, points: int, schedule: Schedule, *, scale: float) -> Tensor:
    """Levels with `points` more in each interval: by the same schedule where it has the given ones among them."""
    finer = schedule((len(levels) - 1) * (points + 1))
    fits = torch.allclose(finer[:: points + 1], levels, rtol=1e-9, atol=1e-12)
    return finer if fits else fine_levels(levels, points + 1, scale=scale)


def check_counts(name: str, values: Sequence[Any], *, least: int = 1) -> None:
    """Raise a `ValueError` unless all values are integers of at least `least`, and there is one."""
    if not values or any(type(value) is not int or value < least for value in values):
        raise ValueError(f"{name} must be integers of at least {least}, but is {list(values)}")
