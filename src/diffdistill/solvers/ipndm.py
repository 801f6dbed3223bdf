"""iPNDM: Adams-Bashforth methods for the probability flow (Zhang and Chen 2023, DEIS, Appendix; Liu et al. 2022)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from diffdistill.solvers.base import Correction, Evaluation, History, Interval, weighted_sum
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.multistep import Multistep

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class IPNDM(Multistep):
    """Adams-Bashforth with the coefficients of equal steps, whatever the steps are. One evaluation per step.

    The stated order holds where the levels are equally spaced; on other smooth schedules it is at most 2.

    Args:
        order: 1 to 4.
        afs: analytical first step.
    """

    def __init__(self, *, order: int = 4, afs: bool = False) -> None:
        super().__init__(order=order, afs=afs)

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        h = interval.sigma_next - interval.sigma
        if correction is not None and correction.scale_dir is not None:
            h = h * correction.scale_dir
        past = self.newest(evaluation, history, self.order_at(interval, history))
        weights = [h * coefficient for coefficient in ADAMS_BASHFORTH[len(past)]]
        return weighted_sum(evaluation.x, None, weights, [e.eps for e in past])


class IPNDMV(IPNDM):
    """iPNDM with coefficients for unequal steps, as published with the AMED toolbox (Zhou et al. 2024).

    Orders 1 and 2 are exact for any steps. In orders 3 and 4 the published coefficients are exact for equal steps only;
    `deis` with mode "rhoab" is the method that is exact for any.
    """

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        h = interval.sigma_next - interval.sigma
        past = self.newest(evaluation, history, self.order_at(interval, history))
        steps = [new.sigma - old.sigma for new, old in pairwise(past)]
        weights = _coefficients(h, steps)
        if correction is not None and correction.scale_dir is not None:
            h = h * correction.scale_dir
        return weighted_sum(evaluation.x, None, weights, [e.eps for e in past], scale=h)


def _coefficients(h: Tensor, steps: list[Tensor]) -> list[Tensor]:
    """Weights of the newest slopes, from the coming step `h` and the past ones, the newest first."""
    if not steps:
        return [h / h]
    h1 = steps[0]
    half = h / h1 / 2
    weights = [1 + half, -half]
    if len(steps) == 1:
        return weights
    h2 = steps[1]
    ratio, h12 = h1 / h2, h1 + h2
    second = (1 - h * h / (3 * h1 * h12)) / 2
    weights = [weights[0] + second, weights[1] - (1 + ratio) * second, ratio * second]
    if len(steps) == 2:
        return weights
    h3 = steps[2]
    h01, h012 = h + h1, h + h12
    third = (1 - h / (3 * h01)) / 2 + (1 - h / (2 * h01)) * h / (6 * h012)
    third = third * (h * h01 * h012) / (h1 * h12 * (h12 + h3))
    far = h1 * h12 / (h2 * (h2 + h3))
    return [
        weights[0] + third,
        weights[1] - (1 + ratio + far) * third,
        weights[2] + (ratio + far * (1 + h2 / h3)) * third,
        -far * ratio * third,
    ]
