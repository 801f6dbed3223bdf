"""Stage 2: a student of N steps imitates two steps of its teacher (Meng et al. 2023, Section 3.2, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.progressive.objective import Hop, StepRegression, bound
from diffdistill.progressive.targets import two_hop_target
from diffdistill.solvers import ProbabilityFlow
from diffdistill.training.randomness import randint


def deterministic_steps(sigmas: Tensor) -> Tensor:
    """The steps that the deterministic N-step sampler takes.

    Args:
        sigmas: the teacher's grid, `[2N + 1]`; the student's is every second level of it.

    Returns:
        `[N, 3]`: where a step begins, where the teacher's first half of it ends, and where the step ends.
    """
    if len(sigmas) % 2 == 0:
        raise ValueError(f"the teacher's grid must have an even number of steps, but has {len(sigmas) - 1}")
    return torch.stack([sigmas[0:-2:2], sigmas[1:-1:2], sigmas[2::2]], dim=1)


def stochastic_steps(sigmas: Tensor) -> Tensor:
    """The deterministic steps inside the stochastic N-step sampler: twice the grid's length, but for the last one.

    Arguments and result are those of `deterministic_steps`.
    """
    halves = deterministic_steps(sigmas)
    grid = sigmas[::2]
    return torch.cat([torch.stack([grid[:-2], grid[1:-1], grid[2:]], dim=1), halves[-1:]])


def encoder_grid(sigmas: Tensor, sigma_min: float) -> Tensor:
    """The grid of an encoder that shares all levels with a sampler's grid but the last, 0, where images are not noise.

    In its place comes `sigma_min`, the level that images are taken to be at.
    """
    return torch.cat([sigmas[:-1], sigmas.new_tensor([sigma_min])]) if sigmas[-1] == 0 else sigmas


def encoder_steps(sigmas: Tensor) -> Tensor:
    """The steps that the deterministic sampler takes from data to noise (Meng et al. 2023, Section 4).

    Arguments and result are those of `deterministic_steps`; the levels of each step increase.
    """
    if sigmas[-1] <= 0:
        raise ValueError("an encoder begins at the last level of its grid, which must be positive")
    return deterministic_steps(sigmas.flip(0))


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "deterministic": deterministic_steps,
    "stochastic": stochastic_steps,
    "encoder": encoder_steps,
}
"""The steps a student is distilled at, by the sampler that it is meant for."""


class StepDistillation(StepRegression):
    """Progressive distillation: both hops are the teacher's, and meet in the middle of the student's step.

    Args:
        teacher, student, weighting, w_range: as for `StepRegression`; the student begins as a copy of the teacher.
        steps: `[S, 3]` from `STEPS`; each batch draws from them uniformly.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        steps: Tensor,
        weighting: Callable[[Tensor], Tensor],
        w_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(teacher, student, weighting=weighting, w_range=w_range)
        self.steps: Tensor
        self.register_buffer("steps", steps.double(), persistent=False)

    def draw(self, count: int, generator: torch.Generator) -> Hop:
        sigma, sigma_mid, sigma_next = self.steps[randint(len(self.steps), (count,), generator)].unbind(1)
        return Hop(sigma, sigma_next, sigma_mid)

    def target(self, x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        assert hop.sigma_mid is not None
        flow = ProbabilityFlow(bound(self.teacher, w), cond)
        return two_hop_target(flow, flow, x, hop.sigma, hop.sigma_mid, hop.sigma_next)
