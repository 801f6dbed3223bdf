"""Training learned solvers, and their files."""

from diffdistill.learned.endpoint import EndpointDistillation, Endpoints, LearnedSampler
from diffdistill.learned.recipe import Task, make_task, trained
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
    "LearnedSampler",
    "LearnedSchedule",
    "LearnedSolver",
    "StepwiseDistillation",
    "Task",
    "identity",
    "load_predictor",
    "make_learned",
    "make_task",
    "save_predictor",
    "shipped_predictors",
    "trained",
]
