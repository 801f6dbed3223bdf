"""The analytic start: from sigma_max to a lower noise level at no evaluation, as if the data were Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import as_denoiser
from diffdistill.solvers.dpm import DPM3
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.gaussian.statistics import GaussianStatistics
from diffdistill.solvers.levels import shared
from diffdistill.solvers.schedules import logsnr
from diffdistill.solvers.step import Evaluation, History, intervals

STEPS_PER_OCTAVE = 2
"""Steps of the guided flow for each halving of sigma; its error is then far below that of the Gaussian itself."""


@dataclass(frozen=True, eq=False)
class GaussianStart:
    """Where a run begins: noise is carried from `sigma_max` to `sigma` by the flow of a Gaussian.

    The noise levels given to `sample` are those that are really stepped through, hence begin at `sigma`.
    Unguided, the flow is in closed form. Guided by w, it is that of `(1 + w) D_c - w D_null` with the denoisers of the
    two Gaussians, integrated by a third-order solver; it asks no network. Multistep solvers are also given the past
    evaluations that they would have, were the data Gaussian, so that they begin with their full order.

    Attributes:
        statistics: means and covariances of the data.
        sigma: the level to begin at.
        sigma_max: the level that the noise stands for; None takes that of the denoiser.
        w: guidance weight, a float or `[B]`; None takes that of the denoiser, if it is guided.
        warm: whether multistep solvers begin with past evaluations.
    """

    statistics: GaussianStatistics
    sigma: float
    sigma_max: float | None = None
    w: float | Tensor | None = None
    warm: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"the sigma of a start must be positive and finite, but is {self.sigma}")
        if self.sigma_max is not None and not self.sigma <= self.sigma_max < float("inf"):
            raise ValueError(f"a start at sigma = {self.sigma} needs a greater sigma_max, but it is {self.sigma_max}")

    def begin(
        self, denoiser: Callable[..., Tensor], noise: Tensor, sigmas: Tensor, cond: Any = None, *, memory: int = 0
    ) -> tuple[Tensor, History]:
        """The state at `self.sigma` for standard normal `noise: [B, ...]`, and the past of a multistep solver.

        Args:
            denoiser: the one to sample, for its `sigma_max` and `w` where they are not given here.
            noise: standard normal, unscaled.
            sigmas: the schedule, on the CPU, which begins at `self.sigma`.
            cond: class labels `[B]`, or another condition, for which the statistics of all data are taken.
            memory: past evaluations that the solver uses. They lie above the schedule, in the ratio of its first two
                levels, or closer where that would pass sigma_max.

        Raises:
            ValueError: the schedule does not begin at `self.sigma`, the denoiser ends below it, or shapes or numbers of
                classes differ.
        """
        first, second = sigmas[:2].tolist()
        if abs(first - self.sigma) > 1e-6 * self.sigma:
            raise ValueError(
                f"with a start at sigma = {self.sigma:g} the noise levels begin there, not at {first:g}: "
                f"make the schedule with sigma_max={self.sigma:g}"
            )
        denoiser = as_denoiser(denoiser)
        top = float(denoiser.sigma_max) if self.sigma_max is None else self.sigma_max
        classes, known = denoiser.num_classes, self.statistics.num_classes
        if classes and known and classes != known:
            raise ValueError(f"the statistics are of {known} classes, but the denoiser is of {classes}")
        if top < self.sigma:
            raise ValueError(f"a start at sigma = {self.sigma:g} lies above the denoiser's sigma_max = {top:g}")
        w, gaussian = self._weight(denoiser), self.denoiser(denoiser)
        x, level, history = (noise * top).to(torch.float64), top, []
        memory = memory if self.warm and top > self.sigma else 0
        ratio = min(self.sigma / second if second else math.inf, (top / self.sigma) ** (1 / max(memory, 1)))
        for back in range(memory, 0, -1):
            past = min(self.sigma * ratio**back, top)
            x, level = self.carry(x, level, past, cond, w), past
            sigma = shared(past, len(x), x.device)
            history.append(Evaluation(x.to(noise.dtype), sigma, gaussian(x, sigma, cond).to(noise.dtype)))
        return self.carry(x, level, self.sigma, cond, w).to(noise.dtype), tuple(history)

    def denoiser(self, denoiser: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
        """What stands for `denoiser` in an analytical first step: the Gaussian's, under the same guidance."""
        w = self._weight(denoiser)
        return lambda x, sigma, cond: self.statistics.to(x.device).denoise(x, sigma, cond, w)

    def carry(self, x: Tensor, sigma: float, sigma_next: float, cond: Any = None, w: float | Tensor = 0.0) -> Tensor:
        """The Gaussian's flow under guidance w: `x: [B, ...]` from `sigma` down to `sigma_next`."""
        statistics = self.statistics.to(x.device)
        if not isinstance(w, Tensor) and w == 0:
            return statistics.carry(x, sigma, sigma_next, cond)
        if math.isclose(sigma, sigma_next):
            return x  # a step of an ulp has no log-SNR to divide by
        num_steps = math.ceil(STEPS_PER_OCTAVE * math.log2(sigma / sigma_next))
        levels = logsnr(num_steps=num_steps, sigma_min=sigma_next, sigma_max=sigma)
        flow = ProbabilityFlow(lambda x, sigma, cond: statistics.denoise(x, sigma, cond, w), cond)
        solver, state = DPM3(), x.to(torch.float64)
        for interval in intervals(levels.tolist(), len(x), x.device):
            state = solver.step(flow, state, interval)[0]
        return state.to(x.dtype)

    def _weight(self, denoiser: Callable[..., Tensor]) -> float | Tensor:
        w = as_denoiser(denoiser).w if self.w is None else self.w
        return 0.0 if w is None else w
