"""Stage 1: one model that takes the guidance weight as an input (Meng et al. 2023, Section 3.1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.models import ClassifierFreeGuidance, GuidanceConditioned
from diffdistill.training.conditions import condition_of
from diffdistill.training.noise_levels import NoiseLevels, add_noise
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import draw_w
from diffdistill.training.weighting import weighted_error


class GuidanceDistillation(Objective):
    """`E omega(sigma) || D_student(z, sigma, y, w) - ((1 + w) D(z, sigma, y) - w D(z, sigma)) ||^2`.

    w is uniform in the student's `w_range`; where both ends are equal this is the paper's baseline, a student for
    a single w.

    Args:
        teacher: the conditional model that classifier-free guidance is applied to; frozen.
        student: from `models.guidance_student(teacher, w_range)`.
        noise_levels: distribution of sigma.
        weighting: `omega`.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        noise_levels: NoiseLevels,
        weighting: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        if student.w_range is None:
            raise ValueError("the student takes no guidance weight: make it with models.guidance_student")
        self.teacher = teacher.eval().requires_grad_(False)
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
        noisy = add_noise(x, sigma, generator)
        with torch.no_grad():
            target = ClassifierFreeGuidance(self.teacher, w)(noisy, sigma, y)
        prediction = GuidanceConditioned(self.trained, w)(noisy, sigma, y)
        return Loss(weighted_error(prediction, target, self.weighting(sigma)), {})
