"""The predictor of AMED: a network of some 9 000 parameters (Zhou et al. 2024, Section 3.3 and Appendix)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.registry import choose
from diffdistill.solvers.amed.predictors import Predictor, check_bound, initial_logits, scale_within
from diffdistill.solvers.levels import level_dtype
from diffdistill.solvers.step import Correction, Interval

SIZE = 8
"""Height and width to which the bottleneck is brought."""
NOISE_CHANNELS = 8
HIDDEN = 128
ENCODED = 4
INPUTS = ENCODED + 2 * NOISE_CHANNELS
"""What the heads see."""
HEADS = {"neutral": 0.0, "published": INPUTS**-0.5}
"""Deviation of the weights of the heads before training."""


def _linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """A layer with zero biases, Xavier-uniform weights, or normal ones of the given deviation."""
    layer = nn.Linear(inputs, outputs)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class AMEDPredictor(Predictor):
    """Predicts r and the scales of each sample from the network's bottleneck and the two noise levels.

    Args:
        scale_dir: bound b of the scale of the direction, which lies in [1 - b, 1 + b]; 0 leaves its head out.
        scale_time: the same for the scale of the time.
        scale_first: the same for the scale of the direction in the first half of a step. Ours: 0 is as published.
        initial: weights of the heads before training. "neutral": zero, so that `r` is `initial_r` and all scales are 1,
            and an untrained plugin is the solver that it wraps; "published": random.
        initial_r: r that the heads start from, one number, or one per interval of the schedule `[N]`.

    Raises:
        ValueError: a bound outside [0, 1), or `initial_r` outside (0, 1).
    """

    offsets: Tensor

    def __init__(
        self,
        scale_dir: float = 0.01,
        scale_time: float = 0.2,
        *,
        scale_first: float = 0.0,
        initial: Literal["neutral", "published"] = "neutral",
        initial_r: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        std = choose("initial", initial, HEADS)
        given = {"scale_dir": scale_dir, "scale_time": scale_time, "scale_first": scale_first}
        self.scales = {name: bound for name, value in given.items() if (bound := check_bound(name, value))}
        self.map_layer0 = _linear(NOISE_CHANNELS, NOISE_CHANNELS)
        self.enc_layer0 = _linear(SIZE * SIZE, HIDDEN, SIZE**-1.0)
        self.enc_layer1 = _linear(HIDDEN, ENCODED, HIDDEN**-0.5)
        self.fc_r = _linear(INPUTS, 1, std)
        for name in self.scales:
            self.add_module(f"fc_{name}", _linear(INPUTS, 1, std))
        # Not in the state, whose names are the published ones: added to what the head of r says.
        self.register_buffer("offsets", initial_logits(initial_r), persistent=False)
        self.num_intervals = len(self.offsets) if self.offsets.ndim else None

    def correction(self, features: Tensor | None, interval: Interval) -> Correction:
        self.check(interval)
        offset = self.offsets[interval.index] if self.offsets.ndim else self.offsets
        return self._predict(features, interval.sigma, interval.sigma_next, offset)

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Correction:
        """Predict.

        Args:
            features: the bottleneck's output `[B, C, h, w]`, or its mean over channels `[B, h, w]`, of any size; None
                stands for zeros.
            sigma: where the step begins, `[B]`, or a scalar.
            sigma_next: where it ends.

        Returns:
            r in (0, 1) and the scales, float64 `[B]` each.

        Raises:
            ValueError: `initial_r` is one number per interval: then `correction`, which knows the interval, predicts.
        """
        if self.offsets.ndim:
            raise ValueError("this predictor has an initial_r for each interval: call correction(features, interval)")
        return self._predict(features, sigma, sigma_next, self.offsets)

    def _predict(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor, offset: Tensor) -> Correction:
        dtype, device = self.fc_r.weight.dtype, self.fc_r.weight.device
        if features is None:
            pooled = torch.zeros(sigma.numel(), SIZE * SIZE, dtype=dtype, device=device)
        else:
            pooled = pool(features).to(dtype)
        with torch.autocast(device.type, enabled=False):  # which is for the large network: these are coefficients
            encoded = self.enc_layer1(F.silu(self.enc_layer0(pooled)))
            levels = [F.silu(self.map_layer0(embed(s.expand(len(pooled))).to(dtype))) for s in (sigma, sigma_next)]
            inputs = torch.cat([encoded, *levels], dim=1)
            logits = {
                name: self.get_submodule(f"fc_{name}")(inputs)[:, 0].to(level_dtype(device))
                for name in ("r", *self.scales)
            }
        scales = {name: scale_within(bound, logits[name]) for name, bound in self.scales.items()}
        return Correction(r=torch.sigmoid(logits["r"] + offset), **scales)


def pool(features: Tensor) -> Tensor:
    """Features of any shape as a map of 8x8, flattened: `[B, 64]`.

    Of `[B, C, h, w]` the mean over channels, of video `[B, C, T, h, w]` over time too; `[B, h, w]`, or the channels and
    places of signals, as they are; `[B, D]` of points in 64 cells. Larger maps are averaged over cells, smaller ones
    repeated.

    Raises:
        ValueError: no dimension but the batch.
    """
    if features.ndim < 2:
        raise ValueError(f"bottleneck features must have the shape [B, D] or [B, C, ...], not {list(features.shape)}")
    if features.ndim == 2:
        return F.adaptive_avg_pool1d(features[:, None], SIZE * SIZE)[:, 0]
    mean = features if features.ndim == 3 else features.flatten(1, -3).mean(1)
    if mean.shape[1:] != (SIZE, SIZE):
        mean = F.adaptive_avg_pool2d(mean[:, None], SIZE)[:, 0]
    return mean.flatten(1)


def embed(sigma: Tensor) -> Tensor:
    """Sines, then cosines, of `sigma: [B]` at frequencies from 1 down to 1/10000: `[B, 8]`, float64."""
    half = NOISE_CHANNELS // 2
    dtype = level_dtype(sigma.device)
    exponents = torch.arange(half, dtype=dtype, device=sigma.device) / (half - 1)
    phases = sigma.to(dtype)[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1)
