"""Multistep DPM-Solver++ for the diffusion SDE (Lu et al. 2022, DPM-Solver++, Section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

from torch import Tensor

from diffdistill.solvers.dpmpp import DPMpp
from diffdistill.solvers.exponential import Form, LinearPart
from diffdistill.solvers.levels import Level, log
from diffdistill.solvers.step import Step, factor


@dataclass(frozen=True)
class _SDEForm:
    """The linear part of the SDE with `eta`: x decays `1 + eta` times as fast as along the ODE."""

    eta: float

    def __call__(self, sigma: Level, sigma_next: Level) -> LinearPart:
        ratio = sigma_next / sigma
        step = -log(ratio)
        return LinearPart(ratio ** (1 + self.eta), -1.0, -(1 + self.eta) * step, step)


class DPMppSDE(DPMpp):
    """DPM-Solver++ of the SDE, one evaluation per step: 2M SDE and 3M SDE of other tools.

    `x_next = (sigma_next / sigma)**(1 + eta) x + ... + sigma_next sqrt(1 - (sigma_next / sigma)**(2 eta)) n`, where the
    rest extrapolates the denoised image as `DPMpp` does. In `sample` the noise n is the increment of a Brownian path
    of each seed, so that a seed gives nearly the same image at any number of steps.

    Args:
        order: 1 to 3.
        eta: 0 is the ODE, 1 the SDE that reverses the forward process.
        lower_order_final: as in `DPMpp`.
    """

    stochastic = True
    brownian: ClassVar[bool] = True
    takes_correction = False

    def __init__(self, *, order: int = 2, eta: float = 1.0, lower_order_final: bool = False) -> None:
        super().__init__(order=order, lower_order_final=lower_order_final)
        if not eta >= 0:
            raise ValueError(f"eta must not be negative, but is {eta}")
        self.eta = eta
        self.form = Form(attrgetter("denoised"), _SDEForm(eta))

    def update(self, step: Step) -> Tensor:
        x, sigma, sigma_next = super().update(step), step.sigma, step.sigma_next
        spread = sigma_next * (1 - (sigma_next / sigma) ** (2 * self.eta)) ** 0.5
        return x + factor(spread, x) * step.fresh
