"""The objective that trains a teacher: denoising score matching with label dropout (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdistill.denoiser import NULL_LABEL, Denoiser
from diffdistill.training.noise_levels import NoiseLevels, add_noise
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import rand
from diffdistill.training.weighting import weighted_error


class Denoising(Objective):
    """`E omega(sigma) || D(x + sigma n, sigma, y) - x ||^2` (Karras et al. 2022, Eq. 2 and 8).

    Args:
        denoiser: the model to train.
        noise_levels: distribution of sigma.
        weighting: `omega`.
        label_dropout: probability with which a label is replaced by "no class", for classifier-free guidance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        noise_levels: NoiseLevels,
        weighting: Callable[[Tensor], Tensor],
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], but is {label_dropout}")
        self.trained = denoiser
        self.noise_levels = noise_levels
        self.weighting = weighting
        self.label_dropout = label_dropout

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds images `x` `[B, ...]` and, for a conditional model, labels `y` `[B]`."""
        x, y = batch["x"], batch.get("y") if self.trained.num_classes else None
        sigma = self.noise_levels(len(x), generator)
        if y is not None and self.label_dropout > 0:
            dropped = rand((len(x),), generator) < self.label_dropout
            y = y.masked_fill(dropped, NULL_LABEL)
        denoised = self.trained(add_noise(x, sigma, generator), sigma, y)
        return Loss(weighted_error(denoised, x, self.weighting(sigma)), {})
