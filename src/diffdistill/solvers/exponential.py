"""The exponential integrators of the DPM-Solver family: two forms of one exact solution.

With `lambda = -log sigma` the flow is linear in x up to the network's answer, so that (Lu et al. 2022, DPM-Solver,
Eq. 3.4, and DPM-Solver++, Eq. 9, for a variance-exploding process)

    x_next = keep * x + gain * sum_k psi_{k+1}(h) f^(k),    psi_1(h) = e^h - 1,  psi_{k+1} = psi_k / h - 1 / k!

where `f^(k)` is the k-th derivative of the network's answer f over the step, whose length counts as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import factorial
from operator import attrgetter

from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.levels import Level, expm1, log
from diffdistill.solvers.step import Evaluation, weighted_sum


@dataclass(frozen=True, eq=False)
class LinearPart:
    """`keep`, `gain` and `h`, and the step in lambda; numbers or `[B]`. A `keep` of None stands for 1."""

    keep: Level | None
    gain: Level
    h: Level
    step: Level

    def psi(self, count: int) -> list[Level]:
        """`psi_1 .. psi_count`."""
        values = [expm1(self.h)]
        for k in range(1, count):
            values.append(values[-1] / self.h - 1 / factorial(k))
        return values

    def advance(self, x: Tensor, weights: list[Level], outputs: list[Tensor], scale: Tensor | None = None) -> Tensor:
        """`keep * x + gain * scale * sum_j weights_j * outputs_j`, with a learned `scale: [B]`, or None for 1."""
        return weighted_sum(x, self.keep, weights, outputs, scale=self.gain if scale is None else self.gain * scale)


@dataclass(frozen=True)
class Form:
    """The answer that is extrapolated, and the solution of the linear part from sigma to sigma_next."""

    output: Callable[[Evaluation], Tensor]
    linear: Callable[[Level, Level], LinearPart]


def _data_form(sigma: Level, sigma_next: Level) -> LinearPart:
    ratio = sigma_next / sigma
    h = log(ratio)
    return LinearPart(ratio, -1.0, h, -h)


def _noise_form(sigma: Level, sigma_next: Level) -> LinearPart:
    h = log(sigma / sigma_next)
    return LinearPart(None, -sigma_next, h, h)


FORMS = {
    "x0": Form(attrgetter("denoised"), _data_form),
    "eps": Form(attrgetter("eps"), _noise_form),
}


def choose_form(prediction: str) -> Form:
    """The form by name, "x0" or "eps"; a `ValueError` otherwise."""
    return choose("prediction", prediction, FORMS)
