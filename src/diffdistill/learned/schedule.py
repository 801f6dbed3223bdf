"""A schedule whose levels are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.solvers import make_schedule
from diffdistill.solvers.schedules import check_sigmas


def halved(schedule: Mapping[str, Any], num_steps: int) -> tuple[Tensor, list[float]]:
    """Every second level of a schedule of twice as many steps, and the places r of the levels in between.

    A plugin around a one-stage solver that starts from these r is that solver on the finer schedule.

    Args:
        schedule: options of `make_schedule`, without `num_steps`.
        num_steps: N.

    Returns:
        Levels `[N + 1]`, and r with `mid = sigma_next**r * sigma**(1 - r)` for each of the N intervals.

    Raises:
        ValueError: a schedule that ends at 0, whose last step has nothing in between.
    """
    fine = make_schedule(**schedule, num_steps=2 * num_steps)
    if fine[-1] == 0:
        raise ValueError("initial_r=schedule needs a schedule that ends above 0")
    logs = fine.log()
    r = (logs[1::2] - logs[:-1:2]) / (logs[2::2] - logs[:-1:2])
    return fine[::2], r.tolist()


LEAST = 1e-6
"""The least share of the range in log sigma that a step has, so that levels stay apart whatever is learned."""


class LearnedSchedule(nn.Module):
    """Noise levels with fixed ends, whose steps in log sigma are learned; they decrease whatever is learned.

    Args:
        sigmas: the levels to start from, `[N + 1]`; a last level of 0 stays, and the one before it is the fixed end.
    """

    ends: Tensor

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64))
        self.to_zero = bool(sigmas[-1] == 0)
        logs = (sigmas[:-1] if self.to_zero else sigmas).log()
        self.register_buffer("ends", logs[[0, -1]])
        shares = logs.diff() / (logs[-1] - logs[0])
        self.logits = nn.Parameter((shares - LEAST).clamp(min=LEAST).log().float())

    def forward(self) -> Tensor:
        """The levels, float64 `[N + 1]`, differentiable."""
        start, end = self.ends
        shares = LEAST + (1 - len(self.logits) * LEAST) * torch.softmax(self.logits.double(), 0)
        passed = shares.cumsum(0)[:-1]
        inner = torch.exp(start + (end - start) * passed)
        parts = [start.exp()[None], inner, end.exp()[None]]
        return torch.cat([*parts, torch.zeros_like(parts[0])] if self.to_zero else parts)
