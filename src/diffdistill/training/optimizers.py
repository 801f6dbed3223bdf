"""Optimisers by name, in their fused form, or with moments of 8 bits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffdistill.training.config import TrainerConfig
from diffdistill.training.sharding import is_split

EIGHT_BIT = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit"}
"""Adam with moments of 8 bits (Dettmers et al. 2022), by the classes of bitsandbytes."""


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    """The optimiser of a config, as one kernel per group of tensors rather than a loop over them.

    Raises:
        ValueError: nothing to train, or an optimiser of 8 bits for parameters that are split over the processes.
        ImportError: an optimiser of 8 bits, and bitsandbytes is not installed.
    """
    if not parameters:
        raise ValueError("the objective trains no parameter: `trained` has none that requires a gradient")
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        fused = not is_split(parameters[0])  # which torch does not have for split ones
        return torch.optim.SGD(parameters, lr, momentum=config.betas[0], weight_decay=decay, fused=fused)
    options: dict[str, Any] = {"lr": lr, "betas": config.betas, "eps": config.eps, "weight_decay": decay}
    if config.optimizer in EIGHT_BIT:
        if is_split(parameters[0]):
            raise ValueError(f"optimizer {config.optimizer} takes whole parameters: choose parallel=ddp, or adamw")
        return getattr(_bitsandbytes(config.optimizer).optim, EIGHT_BIT[config.optimizer])(parameters, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, **options, fused=True)


def _bitsandbytes(optimizer: str) -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"optimizer {optimizer} needs the package bitsandbytes: pip install bitsandbytes ({error})"
        ) from None
