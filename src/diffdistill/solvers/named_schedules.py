"""Schedules by the names of the tools that people sample with. All take `num_steps` levels, then 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.solvers.discrete_time import scaled_linear_table
from diffdistill.solvers.schedules import check_num_steps, check_range, discrete, logsnr, polynomial


def _then_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _last_before_zero(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor | None:
    """The levels of a single step, which has no room for `sigma_min`; None for more.

    Raises:
        ValueError: no step, or ends that are not ordered and positive.
    """
    check_num_steps(num_steps)
    check_range(sigma_min, sigma_max)
    if sigma_min == 0:
        raise ValueError("this schedule adds 0 at its end: sigma_min is the level before it, and positive")
    return torch.tensor([sigma_max], dtype=torch.float64) if num_steps == 1 else None


def karras(*, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in `sigma**(1 / rho)` (Karras et al. 2022, Eq. 5, where the last level is 0)."""
    levels = _last_before_zero(num_steps, sigma_min, sigma_max)
    if levels is None:
        levels = polynomial(num_steps=num_steps - 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return _then_zero(levels)


def exponential(*, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma."""
    levels = _last_before_zero(num_steps, sigma_min, sigma_max)
    if levels is None:
        levels = logsnr(num_steps=num_steps - 1, sigma_min=sigma_min, sigma_max=sigma_max)
    return _then_zero(levels)


def kl_optimal(*, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in `arctan(sigma)`, which bounds the KL divergence best (Sabour et al. 2024, Theorem 3.1)."""
    levels = _last_before_zero(num_steps, sigma_min, sigma_max)
    if levels is None:
        share = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        levels = (share * math.atan(sigma_min) + (1 - share) * math.atan(sigma_max)).tan()
    return _then_zero(levels)


def beta(
    *,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    alpha: float = 0.6,
    beta: float = 0.6,
    table: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Quantiles of a beta distribution, many near both ends (Lee et al. 2024, Beta Sampling is All You Need).

    Args:
        num_steps: levels before 0.
        sigma_min: the lower end; the quantiles are those of sigma between the ends, as in diffusers.
        sigma_max: the upper end.
        alpha: of the distribution.
        beta: of the distribution.
        table: increasing noise levels: then the quantiles are those of the index, rounded, and 1 - i / num_steps of
            the distribution for i < num_steps, as in ComfyUI.

    Raises:
        ImportError: scipy is missing.
        ValueError: ends that are not ordered, or more steps than there are levels to tell apart.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError(
            f'the schedule "beta" needs an extra: pip install "diffdistill[schedules]" ({error})'
        ) from None
    check_num_steps(num_steps)
    if table is not None:
        levels = _table(table, sigma_min, sigma_max)
        share = distribution.ppf(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, alpha, beta)
        return _told_apart(levels, torch.as_tensor(share * (len(levels) - 1)).round().long())
    if sigma_min is None or sigma_max is None:
        raise ValueError('the schedule "beta" needs sigma_min and sigma_max, or a table of noise levels')
    check_range(sigma_min, sigma_max)
    share = distribution.ppf(1 - torch.linspace(0, 1, num_steps, dtype=torch.float64), alpha, beta)
    return _then_zero(sigma_min + torch.as_tensor(share, dtype=torch.float64) * (sigma_max - sigma_min))


def sgm_uniform(
    *,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    table: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Uniform in the index of a table `[T]`, from its last level towards its first, in whose place comes 0."""
    levels = _table(table, sigma_min, sigma_max)
    ends = {"sigma_min": float(levels[0]), "sigma_max": float(levels[-1])}
    return _then_zero(discrete(num_steps=num_steps, table=levels, **ends)[:-1])


def simple(
    *,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    table: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Entries `T - 1 - floor(i T / num_steps)` of a table `[T]`."""
    check_num_steps(num_steps)
    levels = _table(table, sigma_min, sigma_max)
    stride = len(levels) / num_steps
    return _told_apart(levels, torch.tensor([len(levels) - 1 - int(i * stride) for i in range(num_steps)]))


def ddim_uniform(
    *,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    table: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Entries 1, 1 + s, 1 + 2 s, ... of a table `[T]`, backwards, with `s = floor(T / num_steps)`.

    Raises:
        ValueError: the table has another number of such entries than `num_steps`.
    """
    check_num_steps(num_steps)
    levels = _table(table, sigma_min, sigma_max)
    places = range(1, len(levels), max(len(levels) // num_steps, 1))
    if len(places) != num_steps:
        raise ValueError(
            f"ddim_uniform makes {len(places)} steps in place of {num_steps} of a table of {len(levels)} levels: "
            f"take a number of steps that divides {len(levels)}"
        )
    return _told_apart(levels, torch.tensor(places).flip(0))


def _table(table: Sequence[float] | Tensor | None, sigma_min: float | None, sigma_max: float | None) -> Tensor:
    """The levels of a model of discrete time, by default those of latent diffusion models.

    Raises:
        ValueError: they do not increase, or the ends are others than theirs.
    """
    levels = scaled_linear_table() if table is None else torch.as_tensor(table, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (levels[1:] > levels[:-1]).all() or levels[0] <= 0:
        raise ValueError("the table of a schedule must hold at least 2 positive, increasing noise levels")
    low, high = float(levels[0]), float(levels[-1])
    for name, given, own in (("sigma_min", sigma_min, low), ("sigma_max", sigma_max, high)):
        fits = given is None or math.isclose(given, own, rel_tol=1e-6) or (name == "sigma_min" and given == 0)
        if not fits:
            raise ValueError(f"this schedule has the ends of its table, {low} and {high}, but {name} is {given}")
    return levels


def _told_apart(levels: Tensor, places: Tensor) -> Tensor:
    if not (places[1:] < places[:-1]).all():
        raise ValueError(f"{len(places)} steps visit levels of a table of {len(levels)} twice: take fewer steps")
    return _then_zero(levels[places])
