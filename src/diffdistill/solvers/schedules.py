"""Schedules are data: `[num_steps + 1]` decreasing noise levels in float64, built once, outside the solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.noise_levels import interpolate, scaled_linear_table
from diffdistill.registry import construct


def make_schedule(name: str | Sequence[float] | Tensor, **options: Any) -> Tensor:
    """Build a schedule of `num_steps + 1` noise levels, from `sigma_max` down to `sigma_min`.

    Args:
        name: "polynomial" (rho), "logsnr", "time_uniform" (rho), "discrete" (table, rho), "cosine", or the noise
            levels themselves.
        options: `num_steps`, `sigma_min`, `sigma_max` and what the schedule adds to them.

    Returns:
        float64, `[num_steps + 1]`, strictly decreasing.

    Raises:
        ValueError: an unknown name, or levels that do not decrease.
        TypeError: an option that the schedule does not have.
    """
    if isinstance(name, str):
        return check_sigmas(construct("schedule", name, SCHEDULES, **options))
    if options:
        raise TypeError(f"a schedule given as noise levels takes no options, but got {', '.join(options)}")
    return check_sigmas(torch.as_tensor(name, dtype=torch.float64))


def check_sigmas(sigmas: Tensor) -> Tensor:
    """Return `sigmas` if it is a vector of at least two finite, nonnegative, strictly decreasing levels."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"a schedule is a vector of at least 2 noise levels, but got shape {list(sigmas.shape)}")
    if not torch.isfinite(sigmas).all():
        raise ValueError(f"noise levels must be finite, but got {sigmas.tolist()}")
    if sigmas[-1] < 0:
        raise ValueError(f"noise levels must not be negative, but the last is {sigmas[-1].item()}")
    if not (sigmas[1:] < sigmas[:-1]).all():
        raise ValueError(f"noise levels must strictly decrease, but got {sigmas.tolist()}")
    return sigmas


def _unit(num_steps: int) -> Tensor:
    """`i / n` for `i = 0 .. n`."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, but is {num_steps}")
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def _ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Make the two ends exact: rounding in a transform and its inverse leaves them an ulp off."""
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def polynomial(*, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in `sigma**(1 / rho)` (Karras et al. 2022, Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _ends((high + _unit(num_steps) * (low - high)) ** rho, sigma_min, sigma_max)


def logsnr(*, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma, that is in log-SNR (Lu et al. 2022, DPM-Solver)."""
    if sigma_min <= 0:
        raise ValueError(f"the logsnr schedule needs sigma_min > 0, but it is {sigma_min}")
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _ends((high + _unit(num_steps) * (low - high)).exp(), sigma_min, sigma_max)


def vp_betas(sigma_min: float, sigma_max: float, t_end: float = 1e-3) -> tuple[float, float]:
    """`(beta_d, beta_min)` of the linear VP process with these levels at the times `t_end` and 1 (Karras et al. 2022).

    `sigma(t) = sqrt(exp(beta_d t**2 / 2 + beta_min t) - 1)`.
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / t_end - high) / (t_end - 1)
    return beta_d, high - beta_d / 2


def time_uniform(*, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Uniform in `t**(1 / rho)`, with t the time of the linear VP process from 1 to 1e-3 (Song et al. 2021, SDE)."""
    t_end = 1e-3
    beta_d, beta_min = vp_betas(sigma_min, sigma_max, t_end)
    t = (1 + _unit(num_steps) * (t_end ** (1 / rho) - 1)) ** rho
    return _ends(torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt(), sigma_min, sigma_max)


def discrete(
    *,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    table: Sequence[float] | Tensor | None = None,
    rho: float = 1.0,
) -> Tensor:
    """Uniform in `t**(1 / rho)`, with t the index into a table of noise levels and log sigma linear between entries.

    `table: [T]` holds increasing noise levels; the default is that of latent diffusion models.
    """
    levels = scaled_linear_table() if table is None else torch.as_tensor(table, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (levels[1:] > levels[:-1]).all() or levels[0] <= 0:
        raise ValueError("the table of a discrete schedule must hold at least 2 positive, increasing noise levels")
    log_levels, index = levels.log(), torch.arange(len(levels), dtype=torch.float64)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    t_max, t_min = interpolate(ends, log_levels, index).clamp(min=0) ** (1 / rho)
    t = (t_max + _unit(num_steps) * (t_min - t_max)) ** rho
    return _ends(interpolate(t, index, log_levels).exp(), sigma_min, sigma_max)


def cosine(*, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in the time t of the cosine process, `sigma = tan(pi t / 2)` (Salimans and Ho 2022, Section 2)."""
    t_max, t_min = math.atan(sigma_max), math.atan(sigma_min)
    return _ends((t_max + _unit(num_steps) * (t_min - t_max)).tan(), sigma_min, sigma_max)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
    "cosine": cosine,
}
