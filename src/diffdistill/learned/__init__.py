"""Training learned solvers, and their files."""

from diffdistill.learned.endpoint import EndpointDistillation, Endpoints, LearnedSampler
from diffdistill.learned.perceptual import FeatureDistance
from diffdistill.learned.recipe import LastGood, Rescue, Task, initial_levels, make_task, trained
from diffdistill.learned.schedule import LearnedSchedule
from diffdistill.learned.stepwise import StepwiseDistillation
from diffdistill.learned.storage import (
    LearnedSolver,
    identity,
    load_predictor,
    make_learned,
    save_predictor,
    shipped_predictors,
)

__all__ = [
    "EndpointDistillation",
    "Endpoints",
    "FeatureDistance",
    "LastGood",
    "LearnedSampler",
    "LearnedSchedule",
    "LearnedSolver",
    "Rescue",
    "StepwiseDistillation",
    "Task",
    "identity",
    "initial_levels",
    "load_predictor",
    "make_learned",
    "make_task",
    "save_predictor",
    "shipped_predictors",
    "trained",
]
