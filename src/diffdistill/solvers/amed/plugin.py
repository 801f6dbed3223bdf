"""AMED-Plugin and AMED-Solver: learned corrections for the steps of any solver (Zhou et al. 2024, Section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.amed.predictors import FunctionPredictor, Predictor
from diffdistill.solvers.amed.steps import LearnedSteps
from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import AFS, AS_PUBLISHED, Correction, Evaluation, History, Interval, Step


class AMEDPlugin(Solver):
    """A solver around a solver, which holds no update formula of its own: a predictor corrects each step.

    An inner solver of one stage takes two ordinary steps, which meet at `sigma_next**r * sigma**(1 - r)`; one of two
    stages takes one step, whose second stage lies there. So each interval costs two evaluations.

    Args:
        inner_solver: the solver to wrap.
        predictor: a `Predictor`, or any function `(features, sigma, sigma_next) -> Correction`.

    Raises:
        TypeError: an inner solver without a free place, such as Heun, or one that is stochastic or learned itself; a
            predictor that is none.
    """

    stages = 2

    def __init__(self, inner_solver: Solver, predictor: Predictor | Callable[..., Correction]) -> None:
        if (
            not isinstance(inner_solver, Solver)
            or not inner_solver.takes_correction
            or inner_solver.stochastic
            or inner_solver.stages not in (1, 2)
            or isinstance(inner_solver, (AMEDPlugin, LearnedSteps))
        ):
            raise TypeError(
                f"AMEDPlugin cannot wrap {type(inner_solver).__name__}: it needs a deterministic solver of one stage, "
                "or one of two stages whose second has a free place (dpm2)"
            )
        if not callable(predictor):
            raise TypeError(f"predictor must be a Predictor or a function, but is {predictor!r}")
        super().__init__(afs=inner_solver.afs)
        self.inner = inner_solver
        self.memory = inner_solver.memory
        self.predictor = predictor if isinstance(predictor, Predictor) else FunctionPredictor(predictor)
        self.features = self.predictor.features

    def take(self, step: Step) -> tuple[Tensor, History]:
        """Take a step of the inner solver as the correction, by default the predictor's, says."""
        step = replace(step, given=step.given or self.inner.evaluate(replace(step, correction=AS_PUBLISHED)))
        if step.interval.to_zero:
            return step.evaluation.denoised, ()
        if step.correction is AS_PUBLISHED:
            step = replace(step, correction=self.predict(step.evaluation, step.interval))
        if self.inner.stages == 2:
            return self.inner.take(step)
        correction = step.correction
        first, second = step.interval.split(midpoint(step.interval, correction))
        to_mid = Correction(scale_dir=correction.scale_first)
        x, history = self.inner.take(replace(step, interval=first, correction=to_mid))
        from_mid = replace(correction, r=None, scale_first=None)
        return self.inner.take(replace(step, x=x, interval=second, history=history, given=None, correction=from_mid))

    def predict(self, evaluation: Evaluation, interval: Interval) -> Correction:
        """The predictor's correction for the step that starts at `evaluation`.

        Raises:
            ValueError: the predictor needs features, and the network was asked without a tap on its bottleneck.
        """
        analytic = self.inner.afs and interval.index == 0
        if self.features == "required" and evaluation.features is None and not analytic:
            raise ValueError(
                "the predictor reads bottleneck features, but this evaluation has none: "
                "build the flow with features=FeatureTap(denoiser.bottleneck)"
            )
        return self.predictor.correction(evaluation.features, interval)

    def update(self, step: Step) -> Tensor:
        return self.take(step)[0]


def midpoint(interval: Interval, correction: Correction) -> Tensor:
    """`sigma_next**r * sigma**(1 - r)`, with r = 1/2 unless it is given (Zhou et al. 2024, Eq. 9)."""
    r = 0.5 if correction.r is None else correction.r
    return interval.sigma_next**r * interval.sigma ** (1 - r)


class MeanDirection(Solver):
    """`x_next = x + c (sigma_next - sigma) eps_mid`: the slope at one point in between serves the whole step.

    By the mean value theorem such a point exists where the trajectory is a plane curve (Zhou et al. 2024, Eq. 8 to
    10). Uncorrected, at the geometric mean of the ends, this is DPM-Solver-2 without its weights for r. Second order.
    """

    stages = 2

    def update(self, step: Step) -> Tensor:
        x, interval, correction = step.x, step.interval, step.correction
        sigma_mid = midpoint(interval, correction)
        to_mid, whole = sigma_mid - interval.sigma, interval.sigma_next - interval.sigma
        if correction.scale_first is not None:
            to_mid = to_mid * correction.scale_first
        if correction.scale_dir is not None:
            whole = whole * correction.scale_dir
        x_mid = torch.addcmul(x, per_sample(to_mid, x), step.evaluation.eps)
        eps_mid = step.flow(x_mid, sigma_mid, scale_time=correction.scale_time).eps
        return torch.addcmul(x, per_sample(whole, x), eps_mid)


class AMED(AMEDPlugin):
    """AMED-Solver: the learned mean direction of each step.

    Args:
        predictor: as in `AMEDPlugin`.
        afs: analytical first step, as published.
    """

    def __init__(self, predictor: Predictor | Callable[..., Correction], *, afs: AFS = False) -> None:
        super().__init__(MeanDirection(afs=afs), predictor)
