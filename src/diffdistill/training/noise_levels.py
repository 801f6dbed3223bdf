"""Noise levels of training: distributions `draw(batch, generator) -> sigma [batch]`, float64; and noise of a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.registry import construct
from diffdistill.training.randomness import normal_like, rand, randint, randn

NoiseLevels = Callable[[int, torch.Generator], Tensor]


def add_noise(x: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """`x + sigma n` with `n ~ N(0, I)`: data `x` `[B, ...]` at the noise levels `sigma` `[B]`."""
    return x + per_sample(sigma, x) * normal_like(x, generator)


def make_noise_levels(name: str, **options: Any) -> NoiseLevels:
    """Build a distribution by name: "cosine", "lognormal" or "on_schedule"; errors list the valid names and options."""
    return construct("noise-level distribution", name, NOISE_LEVELS, **options)


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
