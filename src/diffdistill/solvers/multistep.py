"""What multistep solvers share: which past evaluations a step may use."""

from __future__ import annotations

from numbers import Integral
from typing import ClassVar

from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import AFS, Evaluation, Step


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

    def past(self, step: Step, *, back: int = 0) -> list[Evaluation]:
        """The evaluations that the step uses, or that the step `back` steps ago used, the newest first.

        Their number is the order of that step.
        """
        index = step.interval.index - back
        order = min(self.order, len(step.history) + 1 - back)
        if self.lower_order_final and index + 1 >= self.order:
            order = max(1, min(order, step.interval.total - index))
        return [step.evaluation, *reversed(step.history)][back : back + order]
