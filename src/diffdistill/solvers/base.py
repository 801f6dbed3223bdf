"""The solver step: per-sample in sigma, differentiable, and a pure function of its arguments.

A solver integrates the probability-flow ODE `dx/dsigma = eps(x, sigma) = (x - D(x, sigma)) / sigma` (Karras et al.
2022, Eq. 4) over one interval. A new solver subclasses `Solver` and writes `update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor

from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.step import AFS, AS_PUBLISHED, Correction, Evaluation, History, Interval, Step


class Solver(ABC):
    """One way to take a step. Solvers hold options and no state: what a step needs of the past is in its `history`.

    Attributes:
        stages: network evaluations of one step.
        memory: past evaluations that a step uses.
        stochastic: whether a step consumes `noise`.
        brownian: whether that noise is the increment of a path, the same whatever the number of steps.
        takes_correction: whether a step can be changed by a `Correction`.
        features: whether a step reads the bottleneck of the network; "optional" is for where there is one.
        afs: analytical first step (Dockhorn et al. 2022): the first evaluation is replaced by the answer for data
            of zero mean and unit variance, `eps = x / sqrt(1 + sigma**2)`, which costs nothing. "gaussian" takes the
            answer for data of the mean and covariance in the `GaussianStart` of the run.
    """

    stages: int = 1
    memory: int = 0
    stochastic: bool = False
    brownian: ClassVar[bool] = False
    takes_correction: bool = True
    features: Literal["unused", "optional", "required"] = "unused"

    def __init__(self, *, afs: AFS = False) -> None:
        if afs not in (True, False, "gaussian"):
            raise ValueError(f'afs must be True, False or "gaussian", but is {afs!r}')
        self.afs: AFS = afs

    def step(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        interval: Interval,
        history: History = (),
        *,
        evaluation: Evaluation | None = None,
        correction: Correction | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, History]:
        """Carry `x: [B, ...]` from `interval.sigma` to `interval.sigma_next`.

        Args:
            flow: answers for the denoiser, and counts.
            x: the state at `interval.sigma`.
            interval: the step to take.
            history: past evaluations, as the previous step returned them.
            evaluation: the evaluation at `(x, interval.sigma)` if the caller has it already.
            correction: learned changes to the step.
            noise: standard normal noise in the shape of `x`, which stochastic solvers need.

        Returns:
            The state at `interval.sigma_next` and the history for the next step.

        Raises:
            TypeError: a correction for a solver that takes none.
        """
        return self.take(Step(flow, x, interval, history, evaluation, correction or AS_PUBLISHED, noise))

    def take(self, step: Step) -> tuple[Tensor, History]:
        """Evaluate, unless that was done, and update; solvers around solvers override this. See `step`."""
        if step.correction is not AS_PUBLISHED and not self.takes_correction:
            raise TypeError(f"{type(self).__name__} takes no correction: none of its stages has a free place")
        step = replace(step, given=step.given or self.evaluate(step))
        if step.interval.to_zero:
            return step.evaluation.denoised, ()
        evaluation = self.correct(step)
        x_next = self.update(replace(step, x=evaluation.x, given=evaluation))
        kept = (*step.history, evaluation)[-self.memory :] if self.memory else ()
        return x_next, kept

    def evaluate(self, step: Step) -> Evaluation:
        """The first evaluation of a step: the network's, or the analytical one."""
        if self.afs and step.interval.index == 0:
            return step.flow.analytic(step.x, step.interval.sigma, gaussian=self.afs == "gaussian")
        scale_time = step.correction.scale_time if self.stages == 1 else None
        return step.flow(step.x, step.interval.sigma, scale_time=scale_time)

    def correct(self, step: Step) -> Evaluation:
        """Improve the point just evaluated before stepping on; predictor-corrector solvers override this."""
        return step.evaluation

    @abstractmethod
    def update(self, step: Step) -> Tensor:
        """Return the state at `step.sigma_next`: the formula of the solver, on `step.evaluation`, and nothing else."""
