"""Inputs of stage 1 from guided runs of the teacher, where a high weight leads away from noisy data."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.solvers import Euler, Interval, ProbabilityFlow
from diffdistill.training.noise_levels import add_noise


@torch.no_grad()
def on_trajectories(
    teacher: Denoiser, like: Tensor, sigma: Tensor, cond: Any, generator: torch.Generator, *, num_steps: int
) -> Tensor:
    """States `[B, ...]` at `sigma: [B]` of runs of the guided teacher, which begin at its largest level.

    Each run takes Euler steps of its own length, equal in `atan(sigma / sigma_data)`. Training on
    guided runs in place of noisy data is the proposal of Adapter Guidance Distillation (2025).

    Args:
        teacher: with its weight bound.
        like: what the states have the shape, dtype and device of.
        sigma: where they are wanted.
        cond: the condition.
        generator: of the noise they begin with.
        num_steps: of each run.
    """
    start = sigma.clamp(min=teacher.sigma_max)
    first, last = ((level / teacher.sigma_data).atan() for level in (start, sigma))
    levels = [teacher.sigma_data * (first + i / num_steps * (last - first)).tan() for i in range(num_steps)] + [sigma]
    x = add_noise(torch.zeros_like(like), start, generator)
    flow, euler = ProbabilityFlow(teacher, cond), Euler()
    for here, there in pairwise(levels):
        x, _ = euler.step(flow, x, Interval(here, there))
    return x
