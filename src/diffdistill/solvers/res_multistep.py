"""Refined exponential multistep solver, RES (Zhang et al. 2023, Improved Order Analysis, Section 4)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from diffdistill.solvers.exponential import choose_form
from diffdistill.solvers.multistep import Multistep
from diffdistill.solvers.step import AFS, Step


class RESMultistep(Multistep):
    """Exponential integrator of the network's answer and its slope, one evaluation per step. Second order.

    The weights satisfy the order conditions exactly, `b2 = phi_2 / c2` and `b1 = phi_1 - b2`, where `DPMpp` of order 2
    has `b2 = phi_1 / (2 c2)`.

    Args:
        prediction: "x0" extrapolates the denoised image, as published, "eps" the noise.
        lower_order_final: let the last step have order 1.
        afs: analytical first step.
    """

    highest_order: ClassVar[int] = 2

    def __init__(
        self, *, prediction: Literal["x0", "eps"] = "x0", lower_order_final: bool = False, afs: AFS = False
    ) -> None:
        super().__init__(order=2, lower_order_final=lower_order_final, afs=afs)
        self.form = choose_form(prediction)

    def update(self, step: Step) -> Tensor:
        past = self.past(step)
        linear = self.form.linear(step.sigma, step.sigma_next)
        psi = linear.psi(len(past))
        weights = [psi[0]]
        if len(past) > 1:
            slope = psi[1] * linear.step / (past[1].log_sigma - past[0].log_sigma)
            weights = [psi[0] + slope, -slope]
        return linear.advance(step.x, weights, [self.form.output(e) for e in past], step.correction.scale_dir)
