"""Consistency distillation in one or several segments (Song et al. 2023; Heek et al. 2024, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.progressive.objective import Hop, StepRegression, bound, check_share, ramp, refuse_compilation
from diffdistill.progressive.targets import eulerian_target, normalised, two_hop_target
from diffdistill.solvers import Euler, ProbabilityFlow, Solver, check_sigmas
from diffdistill.training.noise_levels import NoiseLevels
from diffdistill.training.randomness import randint


def fine_levels(sigmas: Tensor, parts: int, *, scale: float) -> Tensor:
    """`sigmas: [M + 1]` with each interval in so many `parts`, `[M parts + 1]`, equal in `atan(sigma / scale)`."""
    angle, share = (sigmas / scale).atan(), torch.arange(parts, dtype=torch.float64) / parts
    inner = angle[:-1, None] + share * (angle[1:] - angle[:-1])[:, None]
    fine = torch.cat([inner.flatten().tan() * scale, sigmas[-1:]])
    fine[::parts] = sigmas
    return fine


def check_segments(sigmas: Tensor) -> Tensor:
    """Raise a `ValueError` unless the levels of a student are segments that end at 0."""
    if check_sigmas(sigmas)[-1] != 0:
        raise ValueError(f"the last segment must end at 0, but ends at {float(sigmas[-1]):g}")
    return sigmas


class ConsistencyDistillation(StepRegression):
    """The first hop, to the next of T levels in each segment, is the teacher's, the second the student's own.

    Segments are the intervals of the student's levels b_0 > ... > b_M = 0; steps end where their segment does, so that
    the student needs no further input. T grows from few to many over the run, evenly in its logarithm: the first
    targets are far and coarse, the last ones near and fine. With M = 1 that is consistency distillation.

    Args:
        teacher, student, weighting, w_range, error: as for `StepRegression`.
        sigmas: the student's levels, `[M + 1]`.
        fine: T at the beginning and at the end of the run.
        solver: takes the teacher's hop, by default Euler's method.

    Raises:
        ValueError: segments that do not end at 0, or a T that does not grow.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        sigmas: Tensor,
        fine: tuple[int, int],
        weighting: Callable[[Tensor], Tensor],
        w_range: tuple[float, float] | None = None,
        error: str = "squared",
        solver: Solver | None = None,
    ) -> None:
        super().__init__(teacher, student, weighting=weighting, w_range=w_range, error=error)
        self.sigmas, self.fine = check_segments(sigmas.double()), check_growth(fine)
        self.solver = solver or Euler()
        self._known: tuple[int, Tensor] = (0, sigmas)

    @property
    def parts(self) -> int:
        """T, as it is now."""
        first, last = self.fine
        return round(math.exp(math.log(first) + self.progress * (math.log(last) - math.log(first))))

    def edges(self, device: torch.device) -> Tensor:
        """All hops of the teacher now, `[M T, 3]`: where they begin, where they end, and where their segment ends."""
        parts, (known, table) = self.parts, self._known
        if parts != known or table.device != device:
            fine = fine_levels(self.sigmas, parts, scale=self.trained.sigma_data)  # pyright: ignore[reportArgumentType]
            ends = self.sigmas[1:].repeat_interleave(parts)
            table = torch.stack([fine[:-1], fine[1:], ends], dim=1).to(device, non_blocking=True)
            self._known = parts, table
        return table

    def draw(self, count: int, generator: torch.Generator) -> Hop:
        edges = self.edges(generator.device)
        sigma, sigma_mid, sigma_next = edges[randint(len(edges), (count,), generator)].unbind(1)
        return Hop(sigma, sigma_next, sigma_mid)

    def target(self, x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        assert hop.sigma_mid is not None
        teacher = ProbabilityFlow(bound(self.teacher, w), cond)
        student = ProbabilityFlow(bound(self.trained, w, self.ends(hop.sigma_next)), cond)
        return two_hop_target(teacher, student, x, hop.sigma, hop.sigma_mid, hop.sigma_next, solver=self.solver)


def check_growth(fine: tuple[int, int]) -> tuple[int, int]:
    """Raise a `ValueError` unless T begins at 1 or more and grows."""
    given = list(fine) if isinstance(fine, (list, tuple)) else fine
    if not isinstance(given, list) or len(given) != 2 or any(type(n) is not int for n in given):
        raise ValueError(f"fine must be two integers, T at the beginning and at the end, such as [2, 16], not {given}")
    if not 1 <= given[0] < given[1]:
        raise ValueError(f"fine must grow from at least 1, such as [2, 16], but is {given}")
    return given[0], given[1]


class ContinuousConsistency(StepRegression):
    """Consistency in the limit of infinitely many levels, by a derivative in forward mode (Lu and Song 2024, sCM).

    Args:
        teacher, student, weighting, w_range, error: as for `StepRegression`.
        sigmas: the student's levels, `[M + 1]`, as for `ConsistencyDistillation`.
        noise_levels: distribution of where steps begin; levels above `sigmas[0]` count as that one.
        warmup: share of the run over which the derivative comes in; before that, the target is the teacher's answer.
        normalise: shorten steps to the target, see `targets.normalised`.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        sigmas: Tensor,
        noise_levels: NoiseLevels,
        weighting: Callable[[Tensor], Tensor],
        w_range: tuple[float, float] | None = None,
        error: str = "squared",
        warmup: float = 0.3,
        normalise: bool = True,
    ) -> None:
        super().__init__(teacher, student, weighting=weighting, w_range=w_range, error=error)
        self.sigmas: Tensor
        self.register_buffer("sigmas", check_segments(sigmas.double()), persistent=False)
        self.noise_levels = noise_levels
        self.warmup = check_share("warmup", warmup)
        self.normalise = normalise

    forward_mode = True

    @property
    def ramp(self) -> float:
        """How much of the derivative counts now."""
        return ramp(self.progress, self.warmup)

    def draw(self, count: int, generator: torch.Generator) -> Hop:
        sigma = self.noise_levels(count, generator).clamp(max=self.sigmas[0])
        below = (self.sigmas[None, 1:] < sigma[:, None]).long().argmax(1)  # the first level below sigma
        return Hop(sigma, self.sigmas[1:][below])

    def target(self, x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        student = bound(self.trained, w, self.ends(hop.sigma_next))
        denoised, target = eulerian_target(
            bound(self.teacher, w), student, x, hop.sigma, hop.sigma_next, cond, ramp=self.ramp
        )
        return normalised(denoised, target, self.weighting(hop.sigma)) if self.normalise else target

    def compile_networks(self, backend: str = "inductor") -> None:
        refuse_compilation()
