"""Multistep DPM-Solver++ (Lu et al. 2022, DPM-Solver++, Section 4.2)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.exponential import choose_form
from diffdistill.solvers.multistep import Multistep
from diffdistill.solvers.step import AFS, Step

# The second derivative over a step is twice the second divided difference; the published update leaves out the 2.
SECOND_DERIVATIVE = {"published": 1.0, "exact": 2.0}


class DPMpp(Multistep):
    """Multistep exponential integrator, one evaluation per step.

    Args:
        order: 1 to 3.
        prediction: "x0" extrapolates the denoised image (DPM-Solver++), "eps" the noise (DPM-Solver).
        lower_order_final: step i (from 0) of n has at most order n - i, once the order has been reached.
        third_order: "published" is the update that is in use, which has order 2; "exact" has order 3.
        afs: analytical first step.
    """

    highest_order: ClassVar[int] = 3

    def __init__(
        self,
        *,
        order: int = 3,
        prediction: Literal["x0", "eps"] = "x0",
        lower_order_final: bool = True,
        third_order: Literal["published", "exact"] = "published",
        afs: AFS = False,
    ) -> None:
        super().__init__(order=order, lower_order_final=lower_order_final, afs=afs)
        self.form = choose_form(prediction)
        self.second_derivative = choose("third_order", third_order, SECOND_DERIVATIVE)

    def update(self, step: Step) -> Tensor:
        past = self.past(step)
        order, linear = len(past), self.form.linear(step.sigma, step.sigma_next)
        psi = linear.psi(1 if order == 2 else order)
        weights = [psi[0]]
        if order > 1:
            levels = [e.log_sigma for e in past]
            r0 = (levels[1] - levels[0]) / linear.step
            if order == 2:
                slope = 0.5 * psi[0] / r0
                weights = [psi[0] + slope, -slope]
            else:
                r1 = (levels[2] - levels[1]) / linear.step
                total = r0 + r1
                # f^(1) = d0 + r0 * second, f^(2) = c * second, second = (d0 - d1) / (r0 + r1), d0 and d1 differences
                second = (psi[1] * r0 + self.second_derivative * psi[2]) / total
                d0, d1 = (psi[1] + second) / r0, second / r1
                weights = [psi[0] + d0, -d0 - d1, d1]
        return linear.advance(step.x, weights, [self.form.output(e) for e in past], step.correction.scale_dir)
