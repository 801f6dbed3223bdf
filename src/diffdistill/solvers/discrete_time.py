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


def table_from_betas(betas: Sequence[float] | Tensor) -> Tensor:
    """Noise levels `[T]` from the variances `betas` of the steps of the noising process (Ho et al. 2020).

    Raises:
        ValueError: a beta outside (0, 1).
    """
    beta = _numbers("betas", betas)
    wrong = (~((beta > 0) & (beta < 1))).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(f"betas[{place}] = {float(beta[place]):g}: betas lie in (0, 1), so that noise increases")
    return _from_betas(beta)


def table_from_alphas(alphas_cumprod: Sequence[float] | Tensor) -> Tensor:
    """Noise levels `[T]` from `alphas_cumprod`, the part of the variance that is signal, which decreases.

    Raises:
        ValueError: a value outside (0, 1), or one that is not less than the one before it.
    """
    alpha_bar = _numbers("alphas_cumprod", alphas_cumprod)
    wrong = (~((alpha_bar > 0) & (alpha_bar < 1))).nonzero()
    if len(wrong):
        place = int(wrong[0])
        hint = ": a level without signal has no sigma, leave it out" if alpha_bar[place] == 0 else ""
        raise ValueError(
            f"alphas_cumprod[{place}] = {float(alpha_bar[place]):g}: alphas_cumprod lie in (0, 1) and decrease{hint}"
        )
    return _increasing("alphas_cumprod", ((1 - alpha_bar) / alpha_bar).sqrt(), "they must decrease")


def table_from_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """Noise levels `[T]` as they are.

    Raises:
        ValueError: they are not positive and increasing.
    """
    levels = _numbers("sigmas", sigmas)
    if levels[0] <= 0:
        raise ValueError(f"sigmas[0] = {float(levels[0]):g}: noise levels are positive, from the least to the most")
    return _increasing("sigmas", levels, "they must increase, from the least noise to the most")


def _numbers(name: str, values: Sequence[float] | Tensor) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if numbers.ndim != 1 or len(numbers) < 2 or not numbers.isfinite().all():
        raise ValueError(f"{name} must be a vector of at least 2 finite numbers, but have shape {list(numbers.shape)}")
    return numbers


def _increasing(name: str, levels: Tensor, rule: str) -> Tensor:
    wrong = (levels[1:] <= levels[:-1]).nonzero()
    if len(wrong):
        place = int(wrong[0]) + 1
        raise ValueError(f"{name}[{place}] has no more noise than {name}[{place - 1}]: {rule}")
    return levels


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
