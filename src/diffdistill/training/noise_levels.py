"""Noise levels of training: distributions `draw(batch, generator) -> sigma [batch]`, float64; and noise of a level."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.registry import construct
from diffdistill.training.randomness import normal_like, rand, randint, randn

ROUNDING = 1e-3
"""Relative: ends that were rounded are no others."""
NoiseLevels = Callable[[int, torch.Generator], Tensor]


def add_noise(x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """`x + sigma n` with `n ~ N(0, I)`: data `x` `[B, ...]` at the noise levels `sigma` `[B]`."""
    return x + per_sample(sigma, x) * normal_like(x, generator)


def make_noise_levels(name: str, **options: Any) -> NoiseLevels:
    """Build a distribution by name: "cosine", "lognormal" or "on_schedule"; errors list the valid names and options."""
    return construct("noise-level distribution", name, NOISE_LEVELS, **options)


def noise_levels_of(denoiser: Denoiser, options: Mapping[str, Any] | None = None) -> NoiseLevels:
    """A distribution of noise levels for a model.

    Args:
        denoiser: its `sigma_min` and `sigma_max` are the ends of the distribution where `options` do not say others.
        options: of `make_noise_levels`; by default "cosine".

    Raises:
        ValueError, TypeError: as `make_noise_levels`.

    Warns where levels lie outside the range of the model.
    """
    options = dict(options or {"name": "cosine"})
    if options.get("name") == "cosine":
        given = {name: options.get(name) for name in ("sigma_min", "sigma_max")}
        options |= {n: getattr(denoiser, n) if value is None else value for n, value in given.items()}
    made = make_noise_levels(**options)
    if options["name"] == "cosine":
        _warn_outside(denoiser, options["sigma_min"], options["sigma_max"])
    elif options["name"] == "on_schedule":
        levels = [float(sigma) for sigma in options["sigmas"] if sigma > 0]
        _warn_outside(denoiser, min(levels), max(levels))
    return made


def _warn_outside(denoiser: Denoiser, low: float, high: float) -> None:
    if low < denoiser.sigma_min * (1 - ROUNDING) or high > denoiser.sigma_max * (1 + ROUNDING):
        warnings.warn(
            f"noise levels from {low:g} to {high:g} lie outside those of the model, {denoiser.sigma_min:g} to "
            f"{denoiser.sigma_max:g}, which it was not trained on",
            stacklevel=3,
        )


def cosine(*, sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseLevels:
    """Uniform in the time t of the cosine process, `sigma = tan(pi t / 2)` (Meng et al. 2023, Section 3.1)."""
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(f"noise levels lie between 0 <= sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    low, high = math.atan(sigma_min), math.atan(sigma_max)

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        u = rand((batch,), generator, dtype=torch.float64)
        return (low + u * (high - low)).tan()

    return draw


def lognormal(*, mean: float = -1.2, std: float = 1.2) -> NoiseLevels:
    """`log sigma ~ N(mean, std**2)` (Karras et al. 2022, Table 1)."""
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be a number of at least 0, but is {std}")

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        n = randn((batch,), generator, dtype=torch.float64)
        return (mean + std * n).exp()

    return draw


def on_schedule(*, sigmas: Sequence[float] | Tensor) -> NoiseLevels:
    """Uniform on the positive levels of a schedule."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    levels = levels[levels > 0]
    if not len(levels):
        raise ValueError("the schedule to draw from has no positive noise level")

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        index = randint(len(levels), (batch,), generator)
        return levels.to(generator.device, non_blocking=True)[index]

    return draw


NOISE_LEVELS: dict[str, Callable[..., NoiseLevels]] = {
    "cosine": cosine,
    "lognormal": lognormal,
    "on_schedule": on_schedule,
}
