"""Schedules are data: `[num_steps + 1]` decreasing noise levels in float64, built once, outside the solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.discrete_time import interpolate, scaled_linear_table

OF_A_TABLE = ("discrete", "trailing", "sgm_uniform", "simple", "ddim_uniform")
"""The schedules that are made of the levels of a model of discrete time."""


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


def check_num_steps(num_steps: int) -> None:
    """Raise a `ValueError` unless there is at least one step."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, but is {num_steps!r}")


def check_range(sigma_min: float, sigma_max: float, rho: float = 1.0) -> None:
    """Raise a `ValueError` unless `0 <= sigma_min < sigma_max < inf` and `rho > 0`."""
    if not 0 <= sigma_min < sigma_max < math.inf:
        raise ValueError(f"levels must satisfy 0 <= sigma_min < sigma_max, but are {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be positive, but is {rho}")


def _unit(num_steps: int) -> Tensor:
    """`i / n` for `i = 0 .. n`."""
    check_num_steps(num_steps)
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def _ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Make the two ends exact: rounding in a transform and its inverse leaves them an ulp off."""
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def polynomial(*, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in `sigma**(1 / rho)` (Karras et al. 2022, Eq. 5)."""
    check_range(sigma_min, sigma_max, rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _ends((high + _unit(num_steps) * (low - high)) ** rho, sigma_min, sigma_max)


def logsnr(*, num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma, that is in log-SNR (Lu et al. 2022, DPM-Solver)."""
    check_range(sigma_min, sigma_max)
    if sigma_min == 0:
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
    check_range(sigma_min, sigma_max, rho)
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
    check_range(sigma_min, sigma_max, rho)
    if sigma_min == 0:
        raise ValueError("the discrete schedule needs sigma_min > 0, but it is 0")
    levels = scaled_linear_table() if table is None else torch.as_tensor(table, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (levels[1:] > levels[:-1]).all() or levels[0] <= 0:
        raise ValueError("the table of a discrete schedule must hold at least 2 positive, increasing noise levels")
    log_levels, index = levels.log(), torch.arange(len(levels), dtype=torch.float64)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    t_max, t_min = interpolate(ends, log_levels, index).clamp(min=0) ** (1 / rho)
    t = (t_max + _unit(num_steps) * (t_min - t_max)) ** rho
    return _ends(interpolate(t, index, log_levels).exp(), sigma_min, sigma_max)


def cosine(*, num_steps: int, sigma_min: float, sigma_max: float, scale: float = 1.0) -> Tensor:
    """Uniform in the time t of the cosine process, `sigma = scale tan(pi t / 2)` (Salimans and Ho 2022, Section 2).

    Their data have unit variance; `scale` is the standard deviation of data of another.

    Raises:
        ValueError: a `scale` that is not positive.
    """
    check_range(sigma_min, sigma_max)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, but is {scale}")
    t_max, t_min = math.atan(sigma_max / scale), math.atan(sigma_min / scale)
    return _ends(scale * (t_max + _unit(num_steps) * (t_min - t_max)).tan(), sigma_min, sigma_max)


def trailing(
    *,
    num_steps: int,
    sigma_min: float = 0.0,
    sigma_max: float | None = None,
    table: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The "trailing" levels of the diffusers schedulers, then 0: entries `round(T - i T / num_steps) - 1` of a table.

    `table: [T]` holds increasing noise levels; the default is that of latent diffusion models.

    Raises:
        ValueError: ends other than 0 and the last level of the table, or more steps than the table has levels.
    """
    check_num_steps(num_steps)
    levels = scaled_linear_table() if table is None else torch.as_tensor(table, dtype=torch.float64)
    if num_steps > len(levels):
        raise ValueError(f"a trailing schedule of {num_steps} steps needs a table of so many levels, not {len(levels)}")
    if sigma_min != 0 or (sigma_max is not None and not math.isclose(sigma_max, float(levels[-1]), rel_tol=1e-6)):
        raise ValueError(f"a trailing schedule ends at {float(levels[-1])} and 0, not at {sigma_max} and {sigma_min}")
    places = (len(levels) - torch.arange(num_steps, dtype=torch.float64) * (len(levels) / num_steps)).round().long()
    return torch.cat([levels[places - 1], levels.new_zeros(1)])


NOISE_ALONE = 2.0**26
"""A level at which the time of rectified flow, `sigma / (1 + sigma)`, is 1 in float32."""


def flow_levels(
    *, num_steps: int, sigma_min: float = 0.0, sigma_max: float = NOISE_ALONE, shift: float = 1.0
) -> Tensor:
    """The levels of stock flow-matching pipelines: uniform in the time t of rectified flow, from noise alone to 0.

    `t = sigma / (1 + sigma)`, shifted to `shift t / (1 + (shift - 1) t)` (Esser et al. 2024, Section 5.3). At the
    first level Euler's steps keep their digits in float32; solvers that extrapolate need a `sigma_max` such as 1000.

    Raises:
        ValueError: a `sigma_min` other than 0, a `shift` that is not positive, or a `sigma_max` below the second level.
    """
    check_num_steps(num_steps)
    if sigma_min != 0:
        raise ValueError(f"a flow schedule ends at 0, not at {sigma_min}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, but is {shift}")
    index = torch.arange(num_steps + 1, dtype=torch.float64)
    return _ends(shift * (num_steps - index) / index, 0.0, sigma_max)


ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(
    *,
    num_steps: int = 10,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    model: Literal["sd15", "sdxl", "deepfloyd", "svd"] = "sd15",
) -> Tensor:
    """The optimised levels of 10 steps (Sabour et al. 2024, Table 3), log-linear between them for other `num_steps`.

    `sigma_min` and `sigma_max` replace the two ends; None keeps the published ones.
    """
    levels = torch.tensor(choose("model", model, ALIGN_YOUR_STEPS), dtype=torch.float64)
    if num_steps != len(levels) - 1:
        place = torch.arange(len(levels), dtype=torch.float64)
        ends = float(levels[-1]), float(levels[0])
        levels = _ends(interpolate(_unit(num_steps) * (len(levels) - 1), place, levels.log()).exp(), *ends)
    return _ends(
        levels,
        float(levels[-1]) if sigma_min is None else sigma_min,
        float(levels[0]) if sigma_max is None else sigma_max,
    )
