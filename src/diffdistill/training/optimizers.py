"""Optimisers by name, in their fused form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from diffdistill.training.config import TrainerConfig


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    """The optimiser of a config, as one kernel per group of tensors rather than a loop over them."""
    if not parameters:
        raise ValueError("the objective trains no parameter: `trained` has none that requires a gradient")
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=config.betas[0], weight_decay=decay, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True)
