"""The stochastic N-step sampler (Meng et al. 2023, Section 3.3)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers import Euler
from diffdistill.solvers.step import Step


class StochasticEuler(Euler):
    """An Euler step of twice the length, to the level after the next, then noise back to the next.

    In terms of sigma the noise that leads back from `sigma_after` has the variance `sigma_next**2 - sigma_after**2`,
    so that the marginal at `sigma_next` is exact. The last step of a schedule is the deterministic one.
    """

    stochastic = True

    def update(self, step: Step) -> Tensor:
        after = step.interval.sigma_after
        if after is None:
            return super().update(step)
        x = super().update(replace(step, interval=replace(step.interval, sigma_next=after)))
        return x + per_sample((step.interval.sigma_next**2 - after**2).sqrt(), x) * step.fresh
