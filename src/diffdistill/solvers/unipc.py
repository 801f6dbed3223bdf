"""UniPC: a multistep predictor with a corrector that costs no evaluation (Zhao et al. 2023, UniPC, Algorithms 1-4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.exponential import LinearPart, choose_form
from diffdistill.solvers.levels import Level, expm1, plain
from diffdistill.solvers.multistep import Multistep
from diffdistill.solvers.step import AFS, Evaluation, Step

# B(h) of Section 3.1. It matters where a lone rho is set to 1/2; where several rho solve Eq. 5 it cancels.
# The weights w_j of f_j - f_0 follow from f_j = sum_k r_j^k f^(k) / k! in the exact solution (`exponential.py`), for
# polynomials: sum_j w_j r_j^k = c_k with c_k = k! psi_{k+1}. Summing the equations with the coefficients of
# r prod (r - r_i) over the other places leaves one w_j: for a and b, w_a a (a - b) = c_2 - b c_1.
VARIANTS: dict[str, Callable[[Level], Level]] = {"bh1": lambda h: h, "bh2": expm1}


class UniPC(Multistep):
    """Predict, evaluate, correct the point with that evaluation, and predict on from the corrected point.

    Of order `order + 1`, as a corrector raises the order by one; one evaluation per step. The point at the end of a
    run stays predicted. A learned `scale_dir` scales the prediction; the corrector works as published.

    Args:
        order: order of the predictor, 1 to 3.
        variant: "bh1" or "bh2".
        prediction: "x0" or "eps".
        lower_order_final: step i (from 0) of n has at most order n - i, once the order has been reached.
        afs: analytical first step.
    """

    highest_order: ClassVar[int] = 3

    def __init__(
        self,
        *,
        order: int = 3,
        variant: Literal["bh1", "bh2"] = "bh2",
        prediction: Literal["x0", "eps"] = "x0",
        lower_order_final: bool = True,
        afs: AFS = False,
    ) -> None:
        super().__init__(order=order, lower_order_final=lower_order_final, afs=afs)
        self.memory = order  # the corrector looks at as many evaluations before the current one
        self.variant = choose("variant", variant, VARIANTS)
        self.form = choose_form(prediction)
        self.keeping: Literal["denoised", "eps"] = "denoised" if prediction == "x0" else "eps"

    def correct(self, step: Step) -> Evaluation:
        if not step.history:
            return step.evaluation
        past = self.past(step, back=1)
        linear = self.form.linear(plain(past[0].sigma), plain(step.evaluation.sigma))
        weights = self._corrector_weights(linear, self._ratios(linear, past))
        outputs = [self.form.output(e) for e in (*past, step.evaluation)]
        return step.evaluation.moved(linear.advance(past[0].x, weights, outputs), self.keeping)

    def update(self, step: Step) -> Tensor:
        past, linear = self.past(step), self.form.linear(step.sigma, step.sigma_next)
        weights = self._predictor_weights(linear, self._ratios(linear, past))
        return linear.advance(step.x, weights, [self.form.output(e) for e in past], step.correction.scale_dir)

    @staticmethod
    def _ratios(linear: LinearPart, past: list[Evaluation]) -> list[Level]:
        """Places of the past evaluations in steps, `(lambda_j - lambda_0) / step`, negative."""
        return [(past[0].log_sigma - e.log_sigma) / linear.step for e in past[1:]]

    def _predictor_weights(self, linear: LinearPart, ratios: list[Level]) -> list[Level]:
        """Weights of `f_0, f_1, ...`: B(h) rho_j / ratio_j for all but the first (Algorithm 2, Eq. 5)."""
        if not ratios:
            return linear.psi(1)
        if len(ratios) == 1:
            (psi,) = linear.psi(1)
            slope = 0.5 * self.variant(linear.h) / ratios[0]
            return [psi - slope, slope]
        a, b = ratios
        psi, c1, c2 = linear.psi(3)
        c2 = c2 + c2
        gap = a - b
        first, second = (c2 - b * c1) / (gap * a), (a * c1 - c2) / (gap * b)
        return [psi - first - second, first, second]

    def _corrector_weights(self, linear: LinearPart, ratios: list[Level]) -> list[Level]:
        """Weights of `f_0, f_1, ...` and of the new evaluation, whose ratio is 1 (Algorithm 1, Eq. 5)."""
        if not ratios:
            (psi,) = linear.psi(1)
            new = 0.5 * self.variant(linear.h)
            return [psi - new, new]
        a = ratios[0]
        if len(ratios) == 1:
            psi, c1, c2 = linear.psi(3)
            c2 = c2 + c2
            gap = a - 1
            first, new = (c2 - c1) / (gap * a), (a * c1 - c2) / gap
            return [psi - first - new, first, new]
        b = ratios[1]
        psi, c1, c2, c3 = linear.psi(4)
        c2, c3 = c2 + c2, 6 * c3
        low, high, gap, a_1, b_1 = c2 - c1, c3 - c2, a - b, a - 1, b - 1
        first = (high - b * low) / (gap * a_1 * a)
        second = (a * low - high) / (gap * b_1 * b)
        new = (c3 - (a + b) * c2 + a * b * c1) / (a_1 * b_1)
        return [psi - first - second - new, first, second, new]
