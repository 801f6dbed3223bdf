"""iPNDM: Adams-Bashforth methods for the probability flow (Zhang and Chen 2023, DEIS, Appendix; Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.deis import MODES, adams_weights
from diffdistill.solvers.levels import Level, plain
from diffdistill.solvers.multistep import Multistep
from diffdistill.solvers.step import AFS, Step, weighted_sum

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

    def __init__(self, *, order: int = 4, afs: AFS = False) -> None:
        super().__init__(order=order, afs=afs)

    def update(self, step: Step) -> Tensor:
        past, h = self.past(step), step.sigma_next - step.sigma
        weights = [h * coefficient for coefficient in ADAMS_BASHFORTH[len(past)]]
        return weighted_sum(step.x, None, weights, [e.eps for e in past], scale=step.correction.scale_dir)


class IPNDMV(Multistep):
    """iPNDM with coefficients for unequal steps (Zhou et al. 2024, the AMED toolbox). One evaluation per step.

    Args:
        order: 1 to 4.
        coefficients: "published" are those in use, whose order is 3 at most, also on equal steps; "exact" are
            Adams-Bashforth for any steps, the same as `deis` with mode "rhoab".
        afs: analytical first step.
    """

    def __init__(
        self, *, order: int = 4, coefficients: Literal["published", "exact"] = "published", afs: AFS = False
    ) -> None:
        super().__init__(order=order, afs=afs)
        self.coefficients = choose("coefficients", coefficients, COEFFICIENTS)

    def update(self, step: Step) -> Tensor:
        past = self.past(step)
        weights = self.coefficients(step.sigma_next, [plain(e.sigma) for e in past])
        return weighted_sum(step.x, None, weights, [e.eps for e in past], scale=step.correction.scale_dir)


def _published(sigma_next: Level, sigmas: Sequence[Level]) -> list[Level]:
    h, steps = sigma_next - sigmas[0], [new - old for new, old in pairwise(sigmas)]
    return [h * weight for weight in _relative(h, steps)] if steps else [h]


def _relative(h: Level, steps: list[Level]) -> list[Level]:
    """Published weights of the newest slopes over `h`, from the coming step `h` and the past ones, newest first.

    The slope is interpolated in Newton's form, whose terms are divided differences of past slopes times
    `s`, `s (s + h1)`, `s (s + h1) (s + h1 + h2)` at the distance s into the step. `half`, `second` and `third` are the
    means of these over the step, over the denominators of the newest slope in the differences. `half` is exact. Of the
    others the exact ones, which `coefficients="exact"` takes, differ in three places: `second` is
    `(1 - h / (3 h01)) h h01 / (2 h1 h12)`, `third` has a minus between its terms, and in the last weight `h2 / h3`
    stands for `ratio`. Published results were made with the weights as they are here.
    """
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


COEFFICIENTS: dict[str, Callable[[Level, Sequence[Level]], list[Level]]] = {
    "published": _published,
    "exact": partial(adams_weights, MODES["rhoab"]),
}
