"""Noise that is the same whatever the number of steps: increments of a Brownian path of each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.solvers.levels import plain
from diffdistill.solvers.step import Interval

ENDS = -32.0, 32.0
"""Between these values of log sigma the path is known."""
DEPTH = 20
"""Halvings of that interval; within the last, of 6e-5, the path is a straight line."""


class BrownianNoise:
    """A Brownian path `W` in the time log sigma for each sample, found by halving (virtual Brownian tree).

    Each point depends on the seed and the level alone, so that refining a schedule refines the noise (Li et al. 2020,
    Scalable Gradients for Stochastic Differential Equations, Section 4).

    Args:
        seeds: one integer per sample.
        shape: shape of one sample.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.shape = tuple(shape)
        self._last: dict[tuple[float, ...], Tensor] = {}

    def draw(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", interval: Interval
    ) -> Tensor:
        """The increment over an interval, scaled to standard normal, `[B, *shape]`; zeros for a step to 0."""
        if interval.to_zero:
            return torch.zeros(len(self.seeds), *self.shape, dtype=dtype, device=device)
        start, end = self._times(interval.sigma), self._times(interval.sigma_next)
        points = {times: self._last[times] if times in self._last else self._path(times) for times in (start, end)}
        self._last = {end: points[end]}  # where the next interval begins
        lengths = torch.tensor([abs(a - b) for a, b in zip(start, end, strict=True)])
        increment = (points[end] - points[start]) / lengths.sqrt().view(-1, *(1,) * len(self.shape))
        return increment.to(device=device, dtype=dtype)

    def _times(self, sigma: Tensor) -> tuple[float, ...]:
        level = plain(sigma)
        levels = [level] * len(self.seeds) if isinstance(level, float) else sigma.tolist()
        return tuple(min(max(math.log(level), ENDS[0]), ENDS[1]) for level in levels)

    def _path(self, times: tuple[float, ...]) -> Tensor:
        return torch.stack([self._at(seed, time) for seed, time in zip(self.seeds, times, strict=True)])

    def _at(self, seed: int, time: float) -> Tensor:
        (low, high), place = ENDS, 1
        before = torch.zeros(self.shape)
        after = math.sqrt(high - low) * self._normal(seed, 0)
        for _ in range(DEPTH):
            middle, spread = (low + high) / 2, math.sqrt(high - low) / 2
            between = (before + after) / 2 + spread * self._normal(seed, place)
            upper = time >= middle
            low, high, before, after = (middle, high, between, after) if upper else (low, middle, before, between)
            place = 2 * place + upper
        return before + (time - low) / (high - low) * (after - before)

    def _normal(self, seed: int, place: int) -> Tensor:
        mixed = (seed * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(mixed))
