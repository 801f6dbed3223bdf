"""UniPC: a multistep predictor with a corrector that costs no evaluation (Zhao et al. 2023, UniPC, Algorithms 1-4)."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.base import Correction, Evaluation, History, Interval, weighted_sum
from diffdistill.solvers.exponential import LinearPart, choose_form
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.multistep import Multistep

# B(h) of Section 3.1. It matters only where one unknown is set to 1/2; in the solved systems it cancels.
VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {"bh1": lambda h: h, "bh2": torch.expm1}


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
        afs: bool = False,
    ) -> None:
        super().__init__(order=order, lower_order_final=lower_order_final, afs=afs)
        self.memory = order  # the corrector looks at as many evaluations before the current one
        self.variant = choose("variant", variant, VARIANTS)
        self.form = choose_form(prediction)
        self.keeping: Literal["denoised", "eps"] = "denoised" if prediction == "x0" else "eps"

    def correct(self, evaluation: Evaluation, interval: Interval, history: History) -> Evaluation:
        if not history:
            return evaluation
        previous = history[-1]
        past = self.newest(previous, history[:-1], self.order_at(interval, history, back=1))
        linear = self.form.linear(previous.sigma, evaluation.sigma)
        ratios = self._ratios(linear, past)
        slopes = self._slopes(linear, [*ratios, torch.ones_like(linear.h)])
        x = self._advance(linear, [*past, evaluation], [*ratios, None], slopes, None)
        return evaluation.moved(x, self.keeping)

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        scale = None if correction is None else correction.scale_dir
        past = self.newest(evaluation, history, self.order_at(interval, history))
        linear = self.form.linear(interval.sigma, interval.sigma_next)
        ratios = self._ratios(linear, past)
        return self._advance(linear, past, ratios, self._slopes(linear, ratios), scale)

    def _ratios(self, linear: LinearPart, past: list[Evaluation]) -> list[Tensor]:
        """Places of the past evaluations in steps, `(lambda_j - lambda_0) / h`, negative."""
        return [self.form.linear(past[0].sigma, old.sigma).h / linear.h for old in past[1:]]

    def _slopes(self, linear: LinearPart, ratios: list[Tensor]) -> list[Tensor]:
        """`B(h) rho_j`: what multiplies `(f_j - f_0) / ratio_j` (Eq. 5), by the inverse of a Vandermonde matrix."""
        if len(ratios) < 2:
            return [0.5 * self.variant(linear.h)] * len(ratios)
        right = [psi * factorial(k) for k, psi in enumerate(linear.psi(len(ratios) + 1))][1:]
        slopes = []
        for j, node in enumerate(ratios):
            others = [other for k, other in enumerate(ratios) if k != j]
            if len(others) == 1:
                slopes.append((right[1] - others[0] * right[0]) / (node - others[0]))
            else:
                a, b = others
                slopes.append((right[2] - (a + b) * right[1] + a * b * right[0]) / ((node - a) * (node - b)))
        return slopes

    def _advance(
        self,
        linear: LinearPart,
        points: list[Evaluation],
        ratios: list[Tensor] | list[Tensor | None],
        slopes: list[Tensor],
        scale: Tensor | None,
    ) -> Tensor:
        """The state after the step from `points[0]`; a ratio of None stands for 1."""
        others = [s if r is None else s / r for s, r in zip(slopes, ratios, strict=True)]
        first = torch.expm1(linear.h)
        for weight in others:
            first = first - weight
        outputs = [self.form.output(point) for point in points]
        return weighted_sum(points[0].x, linear.keep, linear.weights([first, *others], scale), outputs)
