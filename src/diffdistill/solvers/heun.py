"""Heun's method: EDM's deterministic sampler (Karras et al. 2022, Algorithm 1)."""

from torch import Tensor

from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import Step, weighted_sum


class Heun(Solver):
    """An Euler step to `sigma_next`, then the trapezoidal rule. Second order, two evaluations per step."""

    stages = 2
    takes_correction = False

    def update(self, step: Step) -> Tensor:
        x, d_cur, h = step.x, step.evaluation.eps, step.sigma_next - step.sigma
        d_next = step.flow(weighted_sum(x, None, [h], [d_cur]), step.interval.sigma_next).eps
        return weighted_sum(x, None, [0.5 * h, 0.5 * h], [d_cur, d_next])
