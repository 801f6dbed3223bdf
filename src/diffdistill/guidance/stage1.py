"""Stage 1: one model that takes the guidance weight as an input (Meng et al. 2023, Section 3.1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.guidance.inputs import on_trajectories
from diffdistill.models import ClassifierFreeGuidance, GuidanceConditioned
from diffdistill.training.conditions import condition_of
from diffdistill.training.noise_levels import NoiseLevels, add_noise
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import choice, draw_w
from diffdistill.training.weighting import weighted_error

RESOLUTION = 10_000
"""Of the share of batches from trajectories."""


class GuidanceDistillation(Objective):
    """`E omega(sigma) || D_student(z, sigma, y, w) - D_teacher(z, sigma, y, w) ||^2`, with a guided teacher.

    In the paper that is classifier-free guidance, `(1 + w) D(z, sigma, y) - w D(z, sigma)`. w is uniform in the
    student's `w_range`; where both ends are equal this is the paper's baseline, a student for a single w.

    Args:
        teacher: a guided model from `models.make_guidance`, or a conditional one, which is guided classifier-free;
            frozen.
        student: from `models.guidance_student(teacher, w_range)`.
        noise_levels: distribution of sigma.
        weighting: `omega`.
        trajectories: share of batches whose inputs are states of guided runs of the teacher in place of noisy data.
        num_steps: of these runs.

    Raises:
        ValueError: a student without w, or a share that is none.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        noise_levels: NoiseLevels,
        weighting: Callable[[Tensor], Tensor],
        trajectories: float = 0.0,
        num_steps: int = 8,
    ) -> None:
        super().__init__()
        if student.w_range is None:
            raise ValueError("the student takes no guidance weight: make it with models.guidance_student")
        if not 0 <= trajectories <= 1 or num_steps < 1:
            raise ValueError(f"trajectories must be a share from 0 to 1 of {num_steps} >= 1 steps, not {trajectories}")
        guided = teacher if isinstance(teacher, ClassifierFreeGuidance) else ClassifierFreeGuidance(teacher)
        self.teacher = guided.eval().requires_grad_(False)
        self.trajectories, self.num_steps = trajectories, num_steps
        self.trained = student
        self.w_range = student.w_range
        self.noise_levels = noise_levels
        self.weighting = weighting

    def train(self, mode: bool = True) -> GuidanceDistillation:
        """Keep dropout off: the target is a function of the input, and noise in the student would only blur it."""
        super().train(False)
        return self

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds images `x` `[B, ...]` and their conditions, as `condition_of` reads them."""
        x, y = batch["x"], condition_of(batch, self.teacher)
        sigma = self.noise_levels(len(x), generator)
        w = draw_w(self.w_range, len(x), generator)
        if self.trajectories and choice(RESOLUTION, generator) < RESOLUTION * self.trajectories:
            noisy = on_trajectories(
                GuidanceConditioned(self.teacher, w), x, sigma, y, generator, num_steps=self.num_steps
            )
        else:
            noisy = add_noise(x, sigma, generator)
        with torch.no_grad():
            target = self.teacher(noisy, sigma, y, w=w)
        prediction = GuidanceConditioned(self.trained, w)(noisy, sigma, y)
        return Loss(weighted_error(prediction, target, self.weighting(sigma)), {})
