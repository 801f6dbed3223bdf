"""The solver step: per-sample in sigma, differentiable, and a pure function of its arguments.

A solver integrates the probability-flow ODE `dx/dsigma = eps(x, sigma) = (x - D(x, sigma)) / sigma` (Karras et al.
2022, Eq. 4) over one interval. A new solver subclasses `Solver` and writes `update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.levels import Level, log, plain

if TYPE_CHECKING:
    from diffdistill.solvers.flow import ProbabilityFlow


AFS = bool | Literal["gaussian"]
"""Analytical first step: none, for data of unit variance, or for data of the Gaussian that the run starts with."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One answer of the denoiser at the state `x` and the nominal noise level `sigma: [B]`."""

    x: Tensor
    sigma: Tensor
    denoised: Tensor
    features: Tensor | None = None

    @cached_property
    def eps(self) -> Tensor:
        """The noise that the denoiser sees in `x`: the slope of the ODE."""
        return (self.x - self.denoised) / factor(plain(self.sigma), self.x)

    @cached_property
    def log_sigma(self) -> Level:
        return log(plain(self.sigma))

    def moved(self, x: Tensor, keeping: Literal["denoised", "eps"]) -> Evaluation:
        """The same answer for another state `x` at the same level; `keeping` says which form of it stays as it is."""
        if keeping == "denoised":
            return Evaluation(x, self.sigma, self.denoised, self.features)
        moved = Evaluation(x, self.sigma, x - factor(plain(self.sigma), x) * self.eps, self.features)
        moved.__dict__["eps"] = self.eps  # fills the cache: deriving eps again would lose digits at small sigma
        return moved


@dataclass(frozen=True, eq=False)
class Interval:
    """One step of a schedule, from `sigma` to `sigma_next` (`[B]` each, float64).

    Attributes:
        index, total: this is step number `index` of `total`, counted from 0.
        to_zero: the last step to sigma = 0, whose result is the denoised image.
        sigma_after: the level after `sigma_next`, or None where the schedule ends.
    """

    sigma: Tensor
    sigma_next: Tensor
    index: int = 0
    total: int = 1
    to_zero: bool = False
    sigma_after: Tensor | None = None

    @property
    def ends(self) -> tuple[Level, Level]:
        """`sigma` and `sigma_next` for formulas: numbers where all samples share them."""
        return plain(self.sigma), plain(self.sigma_next)

    def split(self, sigma_mid: Tensor) -> tuple[Interval, Interval]:
        """The two halves that meet at `sigma_mid: [B]`, as steps of a schedule with twice as many."""
        first = Interval(self.sigma, sigma_mid, 2 * self.index, 2 * self.total, False, self.sigma_next)
        second = replace(self, sigma=sigma_mid, index=2 * self.index + 1, total=2 * self.total)
        return first, second


@dataclass(frozen=True, eq=False)
class Correction:
    """Learned changes to one step, `[B]` each; None means "as published" (Zhou et al. 2024, Section 3.3).

    Attributes:
        r: place of the mid point, `sigma_mid = sigma_next**r * sigma**(1 - r)`.
        scale_dir: multiplies the network-dependent term of the update.
        scale_time: multiplies the sigma that the network is given, and nothing else.
        scale_first: multiplies the network-dependent term of the way to the mid point. Ours.
    """

    r: Tensor | None = None
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None
    scale_first: Tensor | None = None


History = tuple[Evaluation, ...]
"""Past evaluations, the newest last."""


def factor(value: Level, like: Tensor) -> Level:
    """What multiplies a state: a number as it is, `[B]` by `per_sample`."""
    return per_sample(value, like) if isinstance(value, Tensor) else value


def weighted_sum(
    x: Tensor,
    keep: Level | None,
    weights: Sequence[Level],
    terms: Sequence[Tensor],
    *,
    scale: Level | None = None,
) -> Tensor:
    """`keep * x + scale * sum_j weights_j * terms_j`, with factors `[B]` or numbers; None stands for 1."""
    total = x if keep is None else factor(keep, x) * x
    for weight, term in zip(weights, terms, strict=True):
        weight = weight if scale is None else weight * scale
        if isinstance(weight, Tensor):
            total = torch.addcmul(total, per_sample(weight, x), term)
        else:
            total = torch.add(total, term, alpha=weight)
    return total


class Solver(ABC):
    """One way to take a step. Solvers hold options and no state: what a step needs of the past is in its `history`.

    Attributes:
        stages: network evaluations of one step.
        memory: past evaluations that a step uses.
        stochastic: whether a step consumes `noise`.
        takes_correction: whether a step can be changed by a `Correction`.
        features: whether a step reads the bottleneck of the network; "optional" is for where there is one.
        afs: analytical first step (Dockhorn et al. 2022): the first evaluation is replaced by the answer for data
            of zero mean and unit variance, `eps = x / sqrt(1 + sigma**2)`, which costs nothing. "gaussian" takes the
            answer for data of the mean and covariance in the `GaussianStart` of the run.
    """

    stages: int = 1
    memory: int = 0
    stochastic: bool = False
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
        if correction is not None and not self.takes_correction:
            raise TypeError(f"{type(self).__name__} takes no correction: none of its stages has a free place")
        if evaluation is None:
            evaluation = self.evaluate(flow, x, interval, correction)
        if interval.to_zero:
            return evaluation.denoised, ()
        evaluation = self.correct(evaluation, interval, history)
        x_next = self.update(flow, evaluation, interval, history, correction)
        kept = (*history, evaluation)[-self.memory :] if self.memory else ()
        return x_next, kept

    def evaluate(
        self, flow: ProbabilityFlow, x: Tensor, interval: Interval, correction: Correction | None = None
    ) -> Evaluation:
        """The first evaluation of a step: the network's, or the analytical one."""
        if self.afs and interval.index == 0:
            return flow.analytic(x, interval.sigma, gaussian=self.afs == "gaussian")
        if correction is not None and self.stages == 1:
            return flow(x, interval.sigma, scale_time=correction.scale_time)
        return flow(x, interval.sigma)

    def check_noise(self, noise: Tensor | None) -> Tensor:
        """Return the noise of a stochastic step; a `ValueError` if there is none."""
        if noise is None:
            raise ValueError(f"{type(self).__name__} is stochastic: pass noise, standard normal in the shape of x")
        return noise

    def correct(self, evaluation: Evaluation, interval: Interval, history: History) -> Evaluation:
        """Improve the point just evaluated before stepping on; predictor-corrector solvers override this."""
        return evaluation

    @abstractmethod
    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        """Return the state at `interval.sigma_next`. The formula of the solver, and nothing else."""
