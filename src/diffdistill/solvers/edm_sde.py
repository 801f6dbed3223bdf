"""EDM's stochastic sampler (Karras et al. 2022, Algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.heun import Heun
from diffdistill.solvers.step import History, Step


class EDMStochastic(Heun):
    """Raise the noise level, then take a step of Heun's method from there. Two evaluations per step.

    The defaults are those of the paper for ImageNet 64x64 (Table 5).

    Args:
        churn: amount of fresh noise over a whole run, S_churn of the paper.
        s_min, s_max: noise levels between which noise is added.
        s_noise: standard deviation of the noise that is added.
    """

    stochastic = True

    def __init__(
        self, *, churn: float = 40.0, s_min: float = 0.05, s_max: float = 50.0, s_noise: float = 1.003
    ) -> None:
        super().__init__()
        if not churn >= 0:
            raise ValueError(f"churn must not be negative, but is {churn}")
        if not 0 <= s_min <= s_max:
            raise ValueError(f"s_min and s_max must be ordered and not negative, but are {s_min} and {s_max}")
        if not s_noise >= 0:
            raise ValueError(f"s_noise must not be negative, but is {s_noise}")
        self.churn, self.s_min, self.s_max, self.s_noise = churn, s_min, s_max, s_noise

    def take(self, step: Step) -> tuple[Tensor, History]:
        if step.given is not None:
            raise ValueError("edm_sde evaluates at a raised noise level: it takes no evaluation")
        x, sigma = step.x, step.interval.sigma
        gamma = min(self.churn / step.interval.total, math.sqrt(2) - 1)
        churned = sigma * ((sigma >= self.s_min) & (sigma <= self.s_max))  # 0 where nothing is added
        # sqrt(sigma_hat**2 - sigma**2), without a root whose gradient is infinite where nothing is added
        added = churned * (math.sqrt(gamma * (2 + gamma)) * self.s_noise)
        x_hat = x + per_sample(added, x) * step.fresh
        return super().take(replace(step, x=x_hat, interval=replace(step.interval, sigma=sigma + gamma * churned)))
