"""Ancestral sampling: Euler steps that go too low and come back with fresh noise (Song et al. 2021, DDIM, Eq. 16)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.step import AFS, Step


class EulerAncestral(Euler):
    """An Euler step to `sigma_down`, then noise of standard deviation `sigma_up`. One evaluation per step.

    `sigma_down**2 + sigma_up**2 = sigma_next**2`, so that the noise level after the step is the scheduled one.

    Args:
        eta: 0 is Euler, 1 draws from the posterior of the forward process.
        afs: analytical first step.
    """

    stochastic = True

    def __init__(self, *, eta: float = 1.0, afs: AFS = False) -> None:
        super().__init__(afs=afs)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], but is {eta}")
        self.eta = eta

    def update(self, step: Step) -> Tensor:
        sigma, sigma_next = step.interval.sigma, step.interval.sigma_next
        gone = 1 - (sigma_next / sigma) ** 2
        down = replace(step.interval, sigma_next=sigma_next * (1 - self.eta**2 * gone).sqrt())
        x = super().update(replace(step, interval=down))
        return x + per_sample(self.eta * sigma_next * gone.sqrt(), x) * step.fresh
