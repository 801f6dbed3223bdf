"""From settings to a training task, and from its result to a learned solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.learned.endpoint import EndpointDistillation, Endpoints, LearnedSampler
from diffdistill.learned.stepwise import StepwiseDistillation
from diffdistill.learned.storage import LearnedSolver, identity
from diffdistill.registry import construct
from diffdistill.solvers import AMEDPlugin, make_schedule, make_solver
from diffdistill.training import Objective

FIRST_TRAINING_SEED = 1_000_000
"""Seeds of the trajectories that are trained on start here, far from those that anyone evaluates."""


@dataclass(frozen=True)
class Task:
    """What the trainer runs."""

    objective: Objective
    data: Endpoints | None


def make_task(learned: LearnedSolver, denoiser: Denoiser, schedule: Mapping[str, Any], **objective: Any) -> Task:
    """Build an objective by name.

    Args:
        learned: what is trained, from `make_learned`.
        denoiser: the model that is sampled.
        schedule: options of `make_schedule` that made `learned.sigmas`, but for `num_steps`.
        objective: `name`, "stepwise" or "endpoint", and the options of `stepwise` or `endpoint`.
    """
    name = objective.pop("name", "stepwise")
    return construct("objective", name, OBJECTIVES, learned, denoiser, schedule, **objective)


def stepwise(
    learned: LearnedSolver,
    denoiser: Denoiser,
    schedule: Mapping[str, Any],
    *,
    teacher: Mapping[str, Any],
    points: int,
    reuse: bool = True,
    together: bool = False,
    forward_mode: bool = False,
) -> Task:
    """The published training.

    Args:
        learned: an AMED-Solver or plugin.
        denoiser: the model that is sampled.
        schedule: options of `make_schedule`, without `num_steps`.
        teacher: options of `make_solver`.
        points: M, the points that the teacher's schedule has more in each interval.
        reuse: see `StepwiseDistillation`, also for `together` and `forward_mode`.
        together: all steps in one batch.
        forward_mode: derivatives in forward mode.
    """
    if not isinstance(learned.solver, AMEDPlugin):
        raise ValueError(f"stepwise training is for the forms amed and plugin, not {learned.form}: use endpoint")
    if learned.start is not None:
        raise ValueError("stepwise training follows runs from noise, not from an analytic start: use endpoint")
    fine = make_schedule(**schedule, num_steps=(points + 1) * learned.num_steps)
    objective = StepwiseDistillation(
        denoiser,
        learned.solver,
        sigmas=learned.sigmas,
        teacher=make_solver(**teacher),
        teacher_sigmas=fine,
        reuse=reuse,
        together=together,
        forward_mode=forward_mode,
    )
    return Task(objective, None)


def endpoint(
    learned: LearnedSolver,
    denoiser: Denoiser,
    schedule: Mapping[str, Any],
    *,
    teacher: Mapping[str, Any],
    teacher_schedule: Mapping[str, Any],
    trajectories: int,
    learn_schedule: bool = True,
    distance: Literal["norm", "squared"] = "norm",
) -> Task:
    """Training on end points.

    Args:
        learned: any learned solver.
        denoiser: the model that is sampled.
        schedule: unused; the levels are those of `learned`.
        teacher: options of `make_solver`, of the fine runs.
        teacher_schedule: options of `make_schedule`, `num_steps` included.
        trajectories: number of fine runs, which are computed once.
        learn_schedule: see `EndpointDistillation`, also for `distance`.
        distance: "norm" or "squared".
    """
    objective = EndpointDistillation(
        denoiser,
        learned.solver,
        sigmas=learned.sigmas,
        learn_schedule=learn_schedule,
        distance=distance,
        start=learned.gaussian_start(device=device_of(denoiser)),
    )
    ends = {"sigma_min": float(learned.sigmas[-1]), "sigma_max": denoiser.sigma_max}
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + trajectories)
    fine = make_schedule(**{**ends, **teacher_schedule})
    return Task(objective, Endpoints(denoiser, make_solver(**teacher), fine, seeds))


OBJECTIVES: dict[str, Callable[..., Task]] = {"stepwise": stepwise, "endpoint": endpoint}


def trained(
    learned: LearnedSolver, result: nn.Module, denoiser: Denoiser, provenance: Mapping[str, Any]
) -> LearnedSolver:
    """`learned` with what the trainer returned, bound to the denoiser that it was trained for."""
    sigmas, predictor = learned.sigmas, result
    if isinstance(result, LearnedSampler):
        with torch.no_grad():
            sigmas, predictor = result.schedule().cpu(), result.predictor
    learned.solver.predictor.load_state_dict(predictor.state_dict())
    return replace(learned, sigmas=sigmas, trained_for=identity(denoiser), provenance=provenance)
