"""How networks of other projects are given a guidance weight: everything here speaks of Meng et al.'s w."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GUIDANCE_CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "w": lambda w: w,
    "scale": lambda w: w + 1,
}
"""What a network embeds, as a function of w.

"w" is what the stock pipelines feed, `guidance_scale - 1`, and what the training script of latent consistency models
embeds. "scale" is `guidance_scale` itself: invertible consistency distillation, and FLUX.
"""


def guidance_scale_embedding(w: Tensor, channels: int) -> Tensor:
    """Embed `w: [B]` as the stock pipelines do (`get_guidance_scale_embedding`): float32 `[B, channels]`, [sin, cos].

    `sin(1000 w f_j)` with `f_j = 10000 ** (-j / (channels / 2 - 1))`. All in float32 and in that order of operations:
    the arguments are thousands of radians, of which float32 keeps three decimals.
    """
    half = channels // 2
    step = torch.tensor(10000.0).log() / (half - 1) if half > 1 else torch.tensor(0.0)
    frequencies = (torch.arange(half, dtype=torch.float32) * -step).exp().to(w.device)
    angles = (w.to(torch.float32) * 1000.0)[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, channels % 2))


def as_in_stock_pipelines(noise: Tensor, sigma_max: float, *, flow: bool = False) -> Tensor:
    """Noise for `diffdistill.sample` that starts where a stock pipeline starts with the same `noise`.

    Stock variance-preserving pipelines start from `x / sqrt(1 + sigma^2) = noise`, those of flow matching from
    `x / (1 + sigma) = noise`, ours from `x = sigma noise`.
    """
    return noise * (1 + 1 / sigma_max if flow else math.sqrt(1 + sigma_max**-2))
