"""The general linear form of a learned solver: an inner solver, and a learned weight for every past answer."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffdistill.solvers.amed.predictors import Predictor, RowPredictor, check_bound, scale_within
from diffdistill.solvers.amed.steps import LearnedSteps
from diffdistill.solvers.base import Solver
from diffdistill.solvers.levels import level_dtype
from diffdistill.solvers.step import AS_PUBLISHED, Correction, History, Step, weighted_sum


class LinearTable(RowPredictor):
    """A trainable row per interval of the weights that `LinearSteps` adds, and of scales. All start neutral.

    Args:
        num_intervals: N.
        lags: answers that have a weight, the current one included; None for all of a run.
        sum_to_zero: the weights of a step sum to 0, so that equal answers add nothing: one number less per step.
        weight_rate: a weight is this times its parameter, so that it moves so much slower than the other numbers.
        scale_dir, scale_time: bounds b; scales lie in [1 - b, 1 + b]; 0 leaves the scale out.

    Raises:
        ValueError: a bound outside [0, 1), no interval, fewer lags than one, or than two that sum to 0.
    """

    SCALES: ClassVar = ("scale_dir", "scale_time")

    def __init__(
        self,
        num_intervals: int,
        *,
        lags: int | None = None,
        sum_to_zero: bool = False,
        weight_rate: float = 0.1,
        scale_dir: float = 0.0,
        scale_time: float = 0.2,
    ) -> None:
        super().__init__()
        lags = num_intervals if lags is None else lags
        for name, value, least in (("num_intervals", num_intervals, 1), ("lags", lags, 1 + sum_to_zero)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, but is {value!r}")
        if lags > num_intervals:
            raise ValueError(
                f"lags={lags}: a run of {num_intervals} intervals has no more than {num_intervals} answers"
            )
        if not weight_rate > 0:
            raise ValueError(f"weight_rate must be positive, but is {weight_rate!r}")
        self.num_intervals, self.lags = num_intervals, lags
        self.sum_to_zero, self.weight_rate = sum_to_zero, weight_rate
        given = zip(self.SCALES, (scale_dir, scale_time), strict=True)
        self.bounds = {name: bound for name, value in given if (bound := check_bound(name, value))}
        for name in self.bounds:
            self.register_parameter(f"logit_{name}", nn.Parameter(torch.zeros(num_intervals)))
        self.weight = nn.Parameter(torch.zeros(num_intervals, lags - sum_to_zero))

    def row(self, index: int, batch: int) -> Correction:
        """The scales of interval `index`, the same for all samples."""
        dtype = level_dtype(self.weight.device)
        return Correction(
            **{
                name: scale_within(bound, self.get_parameter(f"logit_{name}")[index].to(dtype)).expand(batch)
                for name, bound in self.bounds.items()
            }
        )

    def weights(self, index: int, count: int) -> Tensor:
        """Weights of the `count` newest answers in interval `index`, the current one first: `[count]`."""
        weights = self.weight[index, : count - self.sum_to_zero].to(level_dtype(self.weight.device)) * self.weight_rate
        return torch.cat([-weights.sum()[None], weights]) if self.sum_to_zero else weights


class LinearSteps(LearnedSteps):
    """`x_{i+1} = inner(x_i) + (1 - sigma_{i+1} / sigma_i) sum_j c_ij D_j` over the answers `D_j` so far. Ours.

    The answers are those of the denoiser at the levels passed, and of an analytical first step or start. With the
    schedule and `scale_time` learned too, this is the form of the learned linear solvers: Bespoke Non-Stationary
    solvers (Shaul et al. 2024), S4S (Frankel et al. 2025), DyWeight and GAS are cases of it.

    Args:
        inner_solver: the solver to wrap, of one stage.
        predictor: a `LinearTable`.

    Raises:
        TypeError: a solver that `LearnedSteps` refuses, or another predictor.
    """

    predictor: LinearTable

    def __init__(self, inner_solver: Solver, predictor: Predictor) -> None:
        if not isinstance(predictor, LinearTable):
            raise TypeError(f"LinearSteps takes its weights from a LinearTable, not from {type(predictor).__name__}")
        super().__init__(inner_solver, predictor)
        self.memory = max(inner_solver.memory, predictor.lags - 1)

    def take(self, step: Step) -> tuple[Tensor, History]:
        """Take a step of the inner solver and add the weighted answers."""
        if step.interval.to_zero:
            return self.inner.take(step)
        if step.correction is AS_PUBLISHED:
            step = replace(step, correction=self.predictor.correction(None, step.interval))
        step = replace(step, given=step.given or self.inner.evaluate(step))
        recent = step.history[max(len(step.history) - self.inner.memory, 0) :]
        x_next, kept = self.inner.take(replace(step, history=recent))
        history = (*step.history, kept[-1] if kept else step.evaluation)
        answers = [evaluation.denoised for evaluation in history[: -self.predictor.lags - 1 : -1]]
        weights = [w.expand(len(x_next)) for w in self.predictor.weights(step.interval.index, len(answers))]
        x_next = weighted_sum(x_next, None, weights, answers, scale=1 - step.sigma_next / step.sigma)
        return x_next, history[-self.memory :] if self.memory else ()
