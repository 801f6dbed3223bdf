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


def level_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on devices that have no float64, such as Apple's: there numbers alone keep all digits."""
    return torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32


def shared(level: float, batch: int, device: torch.device | str) -> Tensor:
    """The level of all samples as `[B]` of `level_dtype`, which `plain` gives back as a number."""
    sigma = torch.full((batch,), level, dtype=level_dtype(device), device=device)
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
