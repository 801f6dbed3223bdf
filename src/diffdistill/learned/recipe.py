"""From settings to a training task, and from its result to a learned solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.learned.endpoint import EndpointDistillation, Endpoints, LearnedSampler
from diffdistill.learned.perceptual import feature_distance
from diffdistill.learned.schedule import halved
from diffdistill.learned.stepwise import StepwiseDistillation
from diffdistill.learned.storage import LearnedSolver, identity
from diffdistill.registry import construct
from diffdistill.solvers import AMEDPlugin, make_schedule, make_solver
from diffdistill.solvers.integration import THRESHOLDING
from diffdistill.training import Objective, Run

FIRST_TRAINING_SEED = 1_000_000
"""Seeds of the trajectories that are trained on start here, far from those that anyone evaluates."""


@dataclass(frozen=True)
class Task:
    """A training task: the objective, and its data where they are end points computed beforehand."""

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
        thresholding=_thresholding(learned),
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
    features: Mapping[str, Any] | None = None,
    recompute: bool = True,
    limit: float = 10.0,
) -> Task:
    """Training on end points.

    Args:
        learned: any learned solver.
        denoiser: the model that is sampled.
        schedule: unused; the levels are those of `learned`.
        teacher: options of `make_solver`, of the fine runs.
        teacher_schedule: options of `make_schedule`, `num_steps` included.
        trajectories: number of fine runs, which are computed once.
        learn_schedule: see `EndpointDistillation`, also for `distance`, `recompute` and `limit`.
        distance: "norm" or "squared".
        features: `name` and options of a differentiable feature extractor (see `DIFFERENTIABLE`), and `weight`, that of
            `FeatureDistance`; None for the distance of states alone.
        recompute: keep the activations of one step only.
        limit: a loss that counts as infinite, in units of the first.
    """
    objective = EndpointDistillation(
        denoiser,
        learned.solver,
        sigmas=learned.sigmas,
        learn_schedule=learn_schedule,
        distance=distance,
        features=None if features is None else feature_distance(denoiser, **features),
        recompute=recompute,
        limit=limit,
        start=learned.gaussian_start(device=device_of(denoiser)),
        thresholding=_thresholding(learned),
    )
    ends = {"sigma_min": float(learned.sigmas[-1]), "sigma_max": denoiser.sigma_max}
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + trajectories)
    fine = make_schedule(**{**ends, **teacher_schedule})
    thresholding = _thresholding(learned)
    return Task(objective, Endpoints(denoiser, make_solver(**teacher), fine, seeds, thresholding=thresholding))


def _thresholding(learned: LearnedSolver) -> Callable[[Tensor], Tensor] | None:
    return None if learned.thresholding is None else THRESHOLDING[learned.thresholding]


OBJECTIVES: dict[str, Callable[..., Task]] = {"stepwise": stepwise, "endpoint": endpoint}


def initial_levels(
    schedule: Mapping[str, Any], num_steps: int, predictor: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The levels that a learned solver starts from, and its predictor's options.

    `initial_r` "schedule" in the options becomes the places of the levels in between: then an untrained plugin is the
    solver that it wraps on the schedule of twice as many steps.
    """
    options = dict(predictor)
    if options.get("initial_r") != "schedule":
        return make_schedule(**schedule, num_steps=num_steps), options
    sigmas, options["initial_r"] = halved(schedule, num_steps)
    return sigmas, options


@dataclass(frozen=True)
class LastGood:
    """What a training that diverged leaves.

    Attributes:
        learned: the solver of the last good checkpoint, or as it was before training.
        update: updates that it saw.
        step: the step of the run, from 0, where the last batch went astray.
        sigma: the level where that step ends.
    """

    learned: LearnedSolver
    update: int
    step: int
    sigma: float


class Rescue:
    """Remembers a task as it is before training, for `last_good`."""

    def __init__(self, learned: LearnedSolver, task: Task, denoiser: Denoiser) -> None:
        self.learned, self.task, self.denoiser = learned, task, denoiser
        self.before = {name: value.clone() for name, value in task.objective.trained.state_dict().items()}

    def last_good(self, run: Run, provenance: Mapping[str, Any]) -> LastGood:
        """The solver of the newest checkpoint in the folder of the run, and where training went astray."""
        objective, checkpoint = self.task.objective, run.load_checkpoint()
        assert isinstance(objective, (EndpointDistillation, StepwiseDistillation))
        step = objective.diverged_at()
        objective.trained.load_state_dict(self.before if checkpoint is None else checkpoint.state["trained"])
        kept = trained(self.learned, objective.trained, self.denoiser, provenance)
        update = 0 if checkpoint is None else checkpoint.update
        return LastGood(kept, update, step, float(kept.sigmas[step + 1]))


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
