"""Heun's method: EDM's deterministic sampler (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from diffdistill.solvers.base import Solver
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.step import Correction, Evaluation, History, Interval, weighted_sum


class Heun(Solver):
    """An Euler step to `sigma_next`, then the trapezoidal rule. Second order, two evaluations per step."""

    stages = 2
    takes_correction = False

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        x, d_cur = evaluation.x, evaluation.eps
        sigma, sigma_next = interval.ends
        h = sigma_next - sigma
        d_next = flow(weighted_sum(x, None, [h], [d_cur]), interval.sigma_next).eps
        return weighted_sum(x, None, [0.5 * h, 0.5 * h], [d_cur, d_next])
