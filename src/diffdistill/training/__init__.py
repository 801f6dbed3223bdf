"""Objectives and the one trainer that runs them."""

from diffdistill.training.batches import DataError
from diffdistill.training.callbacks import Callback
from diffdistill.training.checkpoints import CheckpointError
from diffdistill.training.config import TrainerConfig
from diffdistill.training.journal import NonFiniteLossError
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.run import Run
from diffdistill.training.signals import Interrupted
from diffdistill.training.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "DataError",
    "Interrupted",
    "Loss",
    "NonFiniteLossError",
    "Objective",
    "Run",
    "Trainer",
    "TrainerConfig",
]
