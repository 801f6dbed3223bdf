"""The probability flow of a denoiser: the only caller of a denoiser, hence the only counter of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import as_denoiser, per_sample
from diffdistill.solvers.levels import Level, on_batch, plain
from diffdistill.solvers.step import Evaluation, factor


class ProbabilityFlow:
    """The probability-flow ODE of a denoiser under a fixed condition, at one noise level per sample.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`.
        cond: the condition handed to the denoiser, such as class labels `[B]`.
        thresholding: applied to every prediction of x0 before use, such as `dynamic_thresholding`.
        features: called after every evaluation for what is kept with it, such as the `FeatureTap` of a bottleneck.
            Of a larger batch that the denoiser makes of the B samples, the first B rows are kept: under guidance the
            conditional ones.
        gaussian: the denoiser of a Gaussian, `(x, sigma, cond) -> x0`, for analytical first steps that ask for it.
        guidance: the guidance weight at a noise level: the denoiser is called with `w: [B]`.

    Attributes:
        nfe: network evaluations so far; a guided denoiser counts twice.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        cond: Any = None,
        *,
        thresholding: Callable[[Tensor], Tensor] | None = None,
        features: Callable[[], Tensor | None] | None = None,
        gaussian: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
        guidance: Callable[[float], float] | None = None,
    ) -> None:
        self.denoiser = as_denoiser(denoiser)
        self.cond = cond
        self.thresholding = thresholding
        self.features = features
        self.gaussian = gaussian
        self.guidance = guidance
        self.nfe = 0

    def __call__(
        self, x: Tensor, sigma: Level, *, scale_time: Tensor | None = None, s: Tensor | None = None
    ) -> Evaluation:
        """Evaluate at `x: [B, ...]` and `sigma: [B]`, or a number for all samples.

        `scale_time: [B]` multiplies the sigma that the network is given; the evaluation keeps the nominal one.
        `s: [B]` is the level at which the step ends, for flow maps.

        Raises:
            ValueError: the denoiser answers in another shape than that of `x`.
        """
        sigma = on_batch(sigma, x)
        given = sigma if scale_time is None else sigma * scale_time
        self.nfe += self.denoiser.cost
        options = {} if s is None else {"s": s}
        if self.guidance is not None:
            options["w"] = self._weight(sigma)
        denoised = self.denoiser(x, given, self.cond, **options)
        if denoised.shape != x.shape:  # which would broadcast
            raise ValueError(f"the denoiser answers {list(denoised.shape)} for x of the shape {list(x.shape)}")
        features = None if self.features is None else self.features()
        features = None if features is None else features[: len(x)]
        return Evaluation(x, sigma, self._threshold(denoised.to(x.dtype)), features)

    def _weight(self, sigma: Tensor) -> Tensor:
        """The guidance weight at `sigma`, `[B]`; levels that samples do not share are read from their device."""
        assert self.guidance is not None
        level = plain(sigma)
        if isinstance(level, float):
            return torch.full((len(sigma),), float(self.guidance(level)), device=sigma.device)
        return torch.tensor([float(self.guidance(value)) for value in sigma.tolist()], device=sigma.device)

    def analytic(self, x: Tensor, sigma: Tensor, *, gaussian: bool = False) -> Evaluation:
        """The analytical first step, at no cost: `eps = x / sqrt(1 + sigma**2)`, x scaled to unit variance.

        Source: Dockhorn et al. 2022 (GENIE), Section 3.2, in the form of Zhou et al. 2024. With `gaussian`, the answer
        is that of the denoiser `self.gaussian`.

        Raises:
            ValueError: `gaussian` without such a denoiser.
        """
        if gaussian:
            if self.gaussian is None:
                raise ValueError('afs="gaussian" needs the statistics of the data: pass start=GaussianStart(...)')
            return Evaluation(x, sigma, self._threshold(self.gaussian(x, sigma, self.cond)))
        level = plain(sigma)
        root = (1 + level**2) ** 0.5
        # x - sigma eps, in a form that keeps its digits where sigma is large.
        return Evaluation(x, sigma, self._threshold(x / factor(root * (root + level), x)))

    def _threshold(self, denoised: Tensor) -> Tensor:
        return denoised if self.thresholding is None else self.thresholding(denoised)


def dynamic_thresholding(
    denoised: Tensor, *, quantile: float = 0.995, least: float = 1.0, most: float = math.inf
) -> Tensor:
    """Clip each sample to the given quantile of its absolute values, within `least` and `most`, and divide it by that.

    Source: Saharia et al. 2022 (Imagen), Section 2.3.
    """
    magnitude = denoised.abs().flatten(1)
    magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))  # quantile takes no half precision
    bound = per_sample(torch.quantile(magnitude, quantile, dim=1).clamp(least, most), denoised)
    return denoised.clamp(-bound, bound) / bound
