"""What multistep solvers share: which past evaluations a step may use."""

from __future__ import annotations

from numbers import Integral
from typing import ClassVar

from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import AFS, Evaluation, History, Interval


class Multistep(Solver):
    """A solver of one evaluation per step that extrapolates from past ones.

    Args:
        order: evaluations that a step uses, the current one included, once there are so many.
        lower_order_final: lower the order towards the end of the run, so that the last step has order 1.
        afs: analytical first step.
    """

    highest_order: ClassVar[int] = 4

    def __init__(self, *, order: int, lower_order_final: bool = False, afs: AFS = False) -> None:
        super().__init__(afs=afs)
        if isinstance(order, bool) or not isinstance(order, Integral) or not 1 <= order <= self.highest_order:
            raise ValueError(f"order must be an integer from 1 to {self.highest_order}, but is {order!r}")
        self.order = order
        self.memory = order - 1
        self.lower_order_final = lower_order_final

    def order_at(self, interval: Interval, history: History, *, back: int = 0) -> int:
        """The order of the step, or of the step `back` steps ago, given the evaluations that were there for it."""
        index = interval.index - back
        order = min(self.order, len(history) + 1 - back)
        if self.lower_order_final and index + 1 >= self.order:
            order = min(order, interval.total - index)
        return max(order, 1)

    @staticmethod
    def newest(evaluation: Evaluation, history: History, count: int) -> list[Evaluation]:
        """The `count` newest evaluations, the current one first."""
        return [evaluation, *history[:-count:-1]]
