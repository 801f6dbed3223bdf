"""A schedule whose levels are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffdistill.solvers.schedules import check_sigmas


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
        self.logits = nn.Parameter((-logs.diff()).log().float())

    def forward(self) -> Tensor:
        """The levels, float64 `[N + 1]`, differentiable."""
        start, end = self.ends
        passed = torch.softmax(self.logits.double(), 0).cumsum(0)[:-1]
        inner = torch.exp(start + (end - start) * passed)
        parts = [start.exp()[None], inner, end.exp()[None]]
        return torch.cat([*parts, torch.zeros_like(parts[0])] if self.to_zero else parts)
