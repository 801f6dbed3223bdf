"""Learned corrections of whole steps: as many evaluations as steps, so odd numbers need no analytical first step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.solvers.amed.predictors import Predictor
from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import AS_PUBLISHED, History, Step


class LearnedSteps(Solver):
    """A one-stage solver whose every step is corrected by `scale_dir` and `scale_time`. Ours.

    The steps are not split, so r plays no part; the schedule is what takes its place, and is learned beside it.

    Args:
        inner_solver: the solver to wrap.
        predictor: a predictor that reads no features, such as `LearnedTable`: it is asked before the network is.

    Raises:
        TypeError: an inner solver that takes no correction, has more stages, is stochastic or learned itself.
        ValueError: a predictor that reads features.
    """

    def __init__(self, inner_solver: Solver, predictor: Predictor) -> None:
        if (
            not inner_solver.takes_correction
            or inner_solver.stochastic
            or inner_solver.stages != 1
            or isinstance(inner_solver, LearnedSteps)
        ):
            raise TypeError(
                f"LearnedSteps cannot wrap {type(inner_solver).__name__}: it needs a deterministic one-stage solver"
            )
        if predictor.features != "unused":
            raise ValueError(
                f"LearnedSteps asks its predictor before the network, but {type(predictor).__name__} reads it"
            )
        super().__init__(afs=inner_solver.afs)
        self.inner = inner_solver
        self.memory = inner_solver.memory
        self.predictor = predictor

    def take(self, step: Step) -> tuple[Tensor, History]:
        """Take a step of the inner solver as the correction, by default the predictor's, says."""
        if step.correction is AS_PUBLISHED and not step.interval.to_zero:
            step = replace(step, correction=replace(self.predictor.correction(None, step.interval), r=None))
        return self.inner.take(step)

    def update(self, step: Step) -> Tensor:
        return self.take(step)[0]
