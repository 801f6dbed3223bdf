"""Noise levels in the formulas of solvers: `[B]`, or a number where all samples share the level.

A step has dozens of operations on its levels. On numbers they cost nothing beside the network, on small tensors they
do; and `[B]` is needed for levels that are learned, or differ between samples. So formulas are written once, for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Level = Tensor | float

_NUMBER = "_diffdistill_level"


def shared(level: float, batch: int, device: torch.device | str) -> Tensor:
    """The level of all samples as float64 `[B]`, which `plain` gives back as a number."""
    sigma = torch.full((batch,), level, dtype=torch.float64, device=device)
    setattr(sigma, _NUMBER, level)
    return sigma


def plain(sigma: Tensor) -> Level:
    """The number behind a level that `shared` made, else `sigma: [B]` itself."""
    return getattr(sigma, _NUMBER, sigma)


def log(level: Level) -> Level:
    """The natural logarithm."""
    return level.log() if isinstance(level, Tensor) else math.log(level)


def expm1(level: Level) -> Level:
    """`e^x - 1`."""
    return torch.expm1(level) if isinstance(level, Tensor) else math.expm1(level)


def on_batch(level: Level, like: Tensor) -> Tensor:
    """A level as float64 `[B]` for the samples `like`."""
    return level if isinstance(level, Tensor) else shared(level, len(like), like.device)
