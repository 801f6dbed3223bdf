"""Stage 2: a student of N steps imitates two steps of its teacher (Meng et al. 2023, Section 3.2, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.models import GuidanceConditioned
from diffdistill.solvers import Euler, Interval, ProbabilityFlow
from diffdistill.training.conditions import condition_of
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import draw_w, normal_like, randint
from diffdistill.training.weighting import weighted_error


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


class StepDistillation(Objective):
    """`E omega(sigma) || D_student(z, sigma, y, w) - x~ ||^2`, with x~ the x0 that leads one step to where two ended.

    Args:
        teacher: the model that takes two steps; frozen.
        student: a copy of the teacher, to be trained.
        steps: `[S, 3]` from `STEPS`; each batch draws from them uniformly.
        weighting: `omega`.
        w_range: the guidance weights to draw, or None for models that take none.
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
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.trained = student
        self.weighting = weighting
        self.w_range = w_range
        self.steps: Tensor
        self.register_buffer("steps", steps.double(), persistent=False)

    def train(self, mode: bool = True) -> StepDistillation:
        """Keep dropout off: the target is a function of the input, and noise in the student would only blur it."""
        super().train(False)
        return self

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds images `x` `[B, ...]` and, for a conditional model, conditions as `condition_of` reads them."""
        x, y = batch["x"], condition_of(batch, self.trained)
        index = randint(len(self.steps), (len(x),), generator)
        sigma, sigma_mid, sigma_next = self.steps[index].unbind(1)
        noisy = x + per_sample(sigma, x) * normal_like(x, generator)
        teacher, student = self.teacher, self.trained
        if self.w_range is not None:
            w = draw_w(self.w_range, len(x), generator)
            teacher, student = GuidanceConditioned(teacher, w), GuidanceConditioned(student, w)
        target = two_step_target(ProbabilityFlow(teacher, y), noisy, sigma, sigma_mid, sigma_next)
        return Loss(weighted_error(student(noisy, sigma, y), target, self.weighting(sigma)), {})


@torch.no_grad()
def two_step_target(flow: ProbabilityFlow, x: Tensor, sigma: Tensor, sigma_mid: Tensor, sigma_next: Tensor) -> Tensor:
    """The x0 for which one Euler step from sigma to sigma_next ends where two of the teacher's end, `[B, ...]`."""
    euler = Euler()
    x_mid, _ = euler.step(flow, x, Interval(sigma, sigma_mid))
    x_next, _ = euler.step(flow, x_mid, Interval(sigma_mid, sigma_next))
    return Euler.invert(x, x_next, Interval(sigma, sigma_next))
