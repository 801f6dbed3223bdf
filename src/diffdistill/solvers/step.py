"""What a step is made of: its interval, the denoiser's answers, learned corrections, and the sums that are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.levels import Level, level_dtype, log, plain, shared

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

    def split(self, sigma_mid: Tensor) -> tuple[Interval, Interval]:
        """The two halves that meet at `sigma_mid: [B]`, as steps of a schedule with twice as many."""
        first = Interval(self.sigma, sigma_mid, 2 * self.index, 2 * self.total, False, self.sigma_next)
        second = replace(self, sigma=sigma_mid, index=2 * self.index + 1, total=2 * self.total)
        return first, second


def intervals(
    sigmas: Tensor | Sequence[float],
    batch: int,
    device: torch.device | str = "cpu",
    *,
    ends_at_zero: bool | None = None,
) -> list[Interval]:
    """The steps of a schedule `[num_steps + 1]` for a batch; a last level of 0 makes the last step one `to_zero`.

    Steps of a tensor are differentiable with respect to it; those of numbers are cheaper, see `solvers.levels`. Of a
    tensor on a GPU, `ends_at_zero` spares the reading of its last level.
    """
    total = len(sigmas) - 1
    if ends_at_zero is None:
        ends_at_zero = bool(sigmas[-1] == 0)
    if isinstance(sigmas, Tensor):
        levels = [level.expand(batch) for level in sigmas.to(device, level_dtype(device), non_blocking=True)]
    else:
        levels = [shared(level, batch, device) for level in sigmas]
    return [
        Interval(
            levels[i],
            levels[i + 1],
            index=i,
            total=total,
            to_zero=ends_at_zero and i + 1 == total,
            sigma_after=levels[i + 2] if i + 2 <= total else None,
        )
        for i in range(total)
    ]


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


AS_PUBLISHED = Correction()
"""The correction of a step that was given none: every field is neutral."""

History = tuple[Evaluation, ...]
"""Past evaluations, the newest last."""


@dataclass(frozen=True, eq=False)
class Step:
    """All that a solver needs for one step; see `Solver.step` for the arguments.

    Attributes:
        x: the state at `interval.sigma`, `[B, ...]`.
        given: the evaluation at `x`, or None before it was made.
    """

    flow: ProbabilityFlow
    x: Tensor
    interval: Interval
    history: History = ()
    given: Evaluation | None = None
    correction: Correction = AS_PUBLISHED
    noise: Tensor | None = None

    @property
    def evaluation(self) -> Evaluation:
        """The denoiser's answer at `x`, which an update can rely on."""
        assert self.given is not None, "the step has not been evaluated yet"
        return self.given

    @property
    def sigma(self) -> Level:
        """The level that the step starts at: a number where all samples share it."""
        return plain(self.interval.sigma)

    @property
    def sigma_next(self) -> Level:
        """The level that the step ends at: a number where all samples share it."""
        return plain(self.interval.sigma_next)

    @property
    def fresh(self) -> Tensor:
        """The noise of a stochastic step; a `ValueError` if there is none."""
        if self.noise is None:
            raise ValueError("this solver is stochastic: pass noise, standard normal in the shape of x")
        return self.noise


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
