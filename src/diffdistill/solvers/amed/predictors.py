"""Predictors: what a learned solver does differently in one step, as a function of the sample or of the place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.solvers.levels import level_dtype
from diffdistill.solvers.step import Correction, Interval

Features = Literal["unused", "optional", "required"]


class Predictor(nn.Module):
    """Maps a step to its `Correction`.

    A predictor that looks at the sample defines `forward(features, sigma, sigma_next)`, one that looks at the place in
    the run overrides `correction`.

    Attributes:
        features: whether it reads the bottleneck of the network.
        num_intervals: number of intervals of the schedules that it serves, or None for any.
    """

    features: Features = "required"
    num_intervals: int | None = None

    def correction(self, features: Tensor | None, interval: Interval) -> Correction:
        """The correction of the step over `interval`.

        Args:
            features: the bottleneck's output at the start of the step, `[B, C, h, w]`, or None where the network was
                not asked (analytical first step).
            interval: the step to take, of the schedule that the user gave.
        """
        self.check(interval)
        return self(features, interval.sigma, interval.sigma_next)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Predictor:
        if level_dtype(fn(torch.zeros(())).device) == torch.float64:
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: fn(t.float() if t.dtype == torch.float64 else t), recurse)

    def check(self, interval: Interval) -> None:
        """Raise `ValueError` if the schedule has another number of intervals; one that ends at 0 has one more."""
        count = self.num_intervals
        if count is not None and (interval.total not in (count, count + 1) or interval.index >= count):
            raise ValueError(f"this predictor is for {count} intervals, but the schedule has {interval.total}")


class FunctionPredictor(Predictor):
    """A plain function `(features, sigma, sigma_next) -> Correction` as a predictor."""

    features: Features = "optional"

    def __init__(self, function: Callable[[Tensor | None, Tensor, Tensor], Correction]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Correction:
        """Call the function."""
        return self.function(features, sigma, sigma_next)


def check_bound(name: str, bound: float) -> float:
    """Return `bound` if scales in [1 - bound, 1 + bound] are positive; a `ValueError` otherwise."""
    if isinstance(bound, bool) or not 0 <= bound < 1:
        raise ValueError(f"{name} bounds a scale to [1 - {name}, 1 + {name}] and must lie in [0, 1), but is {bound!r}")
    return float(bound)


def scale_within(bound: float, logit: Tensor) -> Tensor:
    """A scale in `[1 - bound, 1 + bound]`, which is 1 at a logit of 0 (Zhou et al. 2024, Section 3.3)."""
    return 2 * bound * torch.sigmoid(logit) + (1 - bound)


def initial_logits(initial_r: float | Sequence[float]) -> Tensor:
    """The logits of r to start from, float64: one number, or one per interval `[N]`.

    Raises:
        ValueError: a place outside (0, 1), or no place at all.
    """
    r = torch.as_tensor(initial_r, dtype=torch.float64)
    if r.ndim > 1 or not r.numel() or not ((r > 0) & (r < 1)).all():
        raise ValueError(f"initial_r must lie in (0, 1), one number or one per interval, but is {initial_r!r}")
    return torch.logit(r)


class RowPredictor(Predictor):
    """A predictor with one row of numbers per interval."""

    features: Features = "unused"

    def row(self, index: int, batch: int) -> Correction:
        """The correction of interval `index`, `[batch]` each."""
        raise NotImplementedError(f"{type(self).__name__} defines no row(index, batch)")

    def correction(self, features: Tensor | None, interval: Interval) -> Correction:
        self.check(interval)
        return self.row(interval.index, len(interval.sigma))


class TabulatedPredictor(RowPredictor):
    """Fixed corrections, one row per interval of the schedule.

    Args:
        r, scale_dir, scale_time, scale_first: `[N]`, or `[N, B]` with one column per sample; None for "as published".

    Raises:
        ValueError: no table or row at all, tables of different lengths, `r` outside (0, 1), scales not positive.
    """

    def __init__(
        self,
        r: Sequence[Any] | Tensor | None = None,
        *,
        scale_dir: Sequence[Any] | Tensor | None = None,
        scale_time: Sequence[Any] | Tensor | None = None,
        scale_first: Sequence[Any] | Tensor | None = None,
    ) -> None:
        super().__init__()
        given = {"r": r, "scale_dir": scale_dir, "scale_time": scale_time, "scale_first": scale_first}
        self.num_intervals = next((len(values) for values in given.values() if values is not None), 0)
        if not self.num_intervals:
            raise ValueError(f"a tabulated predictor needs a row for each interval in one of {', '.join(given)}")
        for name, values in given.items():
            table = None if values is None else torch.as_tensor(values, dtype=torch.float64)
            if table is not None:
                if table.ndim not in (1, 2) or len(table) != self.num_intervals:
                    raise ValueError(
                        f"the table {name} must have the shape [N] or [N, B] with N = {self.num_intervals}, "
                        f"but has shape {list(table.shape)}"
                    )
                highest = 1.0 if name == "r" else float("inf")
                if not ((table > 0) & (table < highest)).all():
                    raise ValueError(f"the table {name} must lie between 0 and {highest}, but is {table.tolist()}")
            self.register_buffer(name, table)

    def row(self, index: int, batch: int) -> Correction:
        """The correction of interval `index`; a row of a single number serves all samples."""
        values = {}
        for name, table in self.named_buffers():
            row = table[index]
            if row.ndim == 1 and len(row) != batch:
                raise ValueError(f"the table {name} has columns for {len(row)} samples, but the batch has {batch}")
            values[name] = row.expand(batch)
        return Correction(**values)


class LearnedTable(RowPredictor):
    """Learned numbers per interval, the same for all samples: the simplest predictor there is.

    It starts neutral: all scales are 1.

    Args:
        num_intervals: N.
        scale_dir, scale_time, scale_first: bounds b; scales lie in [1 - b, 1 + b]; 0 leaves the scale out.
        initial_r: r to start from, one number or one per interval.

    Raises:
        ValueError: a bound outside [0, 1), no interval, or `initial_r` outside (0, 1) or of another length.
    """

    SCALES: ClassVar = ("scale_dir", "scale_time", "scale_first")

    def __init__(
        self,
        num_intervals: int,
        *,
        scale_dir: float = 0.01,
        scale_time: float = 0.2,
        scale_first: float = 0.0,
        initial_r: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        if isinstance(num_intervals, bool) or not isinstance(num_intervals, Integral) or num_intervals < 1:
            raise ValueError(f"num_intervals must be an integer of at least 1, but is {num_intervals!r}")
        self.num_intervals = num_intervals
        given = (scale_dir, scale_time, scale_first)
        self.bounds = {name: check_bound(name, bound) for name, bound in zip(self.SCALES, given, strict=True)}
        logits = initial_logits(initial_r)
        if logits.ndim and len(logits) != num_intervals:
            raise ValueError(f"initial_r has {len(logits)} numbers, but there are {num_intervals} intervals")
        self.logit_r = nn.Parameter(logits.float().expand(num_intervals).clone())
        for name, bound in self.bounds.items():
            self.register_parameter(f"logit_{name}", nn.Parameter(torch.zeros(num_intervals)) if bound else None)

    def row(self, index: int, batch: int) -> Correction:
        """The correction of interval `index`, the same for all samples."""
        scales = {
            name: scale_within(
                bound, self.get_parameter(f"logit_{name}")[index].to(level_dtype(self.logit_r.device))
            ).expand(batch)
            for name, bound in self.bounds.items()
            if bound
        }
        return Correction(
            r=torch.sigmoid(self.logit_r[index].to(level_dtype(self.logit_r.device))).expand(batch), **scales
        )
