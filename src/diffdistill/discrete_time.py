"""Tables of the noise levels of discrete-time models, and the interpolation between their entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffdistill.registry import choose


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear interpolation of `(xs, ys)`, `xs` increasing; differentiable in x, linear beyond the ends."""
    right = torch.searchsorted(xs, x.detach().contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (x - x0) * ((y1 - y0) / (x1 - x0))


def _from_betas(beta: Tensor) -> Tensor:
    alpha_bar = torch.cumprod(1 - beta, 0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def scaled_linear_table() -> Tensor:
    """The 1000 noise levels of latent diffusion models, increasing (Rombach et al. 2022)."""
    return _from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)


def linear_table() -> Tensor:
    """The 1000 noise levels of DDPM, increasing (Ho et al. 2020, Section 4)."""
    return _from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def iddpm_table(*, c1: float = 0.001, c2: float = 0.008, steps: int = 1000) -> Tensor:
    """The noise levels of improved DDPM's cosine schedule, increasing (Karras et al. 2022, Table 1 and Appendix C.3.4).

    `c1` bounds the ratio of neighbouring signal levels, `c2` shifts the cosine; the level 0 is left out.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = (0.5 * math.pi * j / (steps * (c2 + 1))).sin() ** 2
    # u[j - 1]^2 + 1 = (u[j]^2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], c1), from u[steps] = 0 downwards.
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=c1).flip(0)
    return (torch.cumprod(1 / ratio, 0) - 1).sqrt()


TABLES: dict[str, Callable[[], Tensor]] = {
    "scaled_linear": scaled_linear_table,
    "linear": linear_table,
    "iddpm": iddpm_table,
}


def make_table(table: str | Sequence[float] | Tensor) -> Tensor:
    """A table `[T]` of positive, increasing noise levels in float64: one of `TABLES` by name, or the levels themselves.

    Raises:
        ValueError: an unknown name, or levels that are not positive and increasing.
    """
    if isinstance(table, str):
        return choose("table of noise levels", table, TABLES)()
    levels = torch.as_tensor(table, dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or levels[0] <= 0 or not (levels[1:] > levels[:-1]).all():
        raise ValueError("a table of noise levels must hold at least 2 positive, increasing numbers")
    return levels
