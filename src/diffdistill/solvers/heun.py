"""Heun's method: EDM's deterministic sampler (Karras et al. 2022, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.base import Correction, Evaluation, History, Interval, Solver
from diffdistill.solvers.flow import ProbabilityFlow


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
        h = per_sample(interval.sigma_next - interval.sigma, x)
        d_next = flow(x + h * d_cur, interval.sigma_next).eps
        return x + h * (0.5 * d_cur + 0.5 * d_next)
