"""The predictor of AMED: a network of some 9 000 parameters (Zhou et al. 2024, Section 3.3 and Appendix)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.solvers.amed.predictors import Predictor, check_bound, scale_within
from diffdistill.solvers.step import Correction

SIZE = 8
"""Height and width to which the bottleneck is brought."""
NOISE_CHANNELS = 8
HIDDEN = 128
ENCODED = 4


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

    Raises:
        ValueError: a bound outside [0, 1).
    """

    def __init__(self, scale_dir: float = 0.01, scale_time: float = 0.2, *, scale_first: float = 0.0) -> None:
        super().__init__()
        given = {"scale_dir": scale_dir, "scale_time": scale_time, "scale_first": scale_first}
        self.scales = {name: bound for name, value in given.items() if (bound := check_bound(name, value))}
        self.map_layer0 = _linear(NOISE_CHANNELS, NOISE_CHANNELS)
        self.enc_layer0 = _linear(SIZE * SIZE, HIDDEN, SIZE**-1.0)
        self.enc_layer1 = _linear(HIDDEN, ENCODED, HIDDEN**-0.5)
        inputs = ENCODED + 2 * NOISE_CHANNELS
        self.fc_r = _linear(inputs, 1, inputs**-0.5)
        for name in self.scales:
            self.add_module(f"fc_{name}", _linear(inputs, 1, inputs**-0.5))

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Correction:
        """Predict.

        Args:
            features: the bottleneck's output `[B, C, h, w]`, or its mean over channels `[B, h, w]`, of any size; None
                stands for zeros.
            sigma: where the step begins, `[B]`, or a scalar.
            sigma_next: where it ends.

        Returns:
            r in (0, 1) and the scales, float64 `[B]` each.
        """
        dtype, device = self.fc_r.weight.dtype, self.fc_r.weight.device
        if features is None:
            pooled = torch.zeros(sigma.numel(), SIZE * SIZE, dtype=dtype, device=device)
        else:
            pooled = pool(features).to(dtype)
        with torch.autocast(device.type, enabled=False):  # which is for the large network: these are coefficients
            encoded = self.enc_layer1(F.silu(self.enc_layer0(pooled)))
            levels = [F.silu(self.map_layer0(embed(s.expand(len(pooled))).to(dtype))) for s in (sigma, sigma_next)]
            inputs = torch.cat([encoded, *levels], dim=1)
            logits = {name: self.get_submodule(f"fc_{name}")(inputs)[:, 0].double() for name in ("r", *self.scales)}
        scales = {name: scale_within(bound, logits[name]) for name, bound in self.scales.items()}
        return Correction(r=torch.sigmoid(logits["r"]), **scales)


def pool(features: Tensor) -> Tensor:
    """Mean over channels of `[B, C, h, w]`, or `[B, h, w]` as it is, brought to 8x8 and flattened: `[B, 64]`.

    Larger maps are averaged over cells, smaller ones repeated.
    """
    if features.ndim not in (3, 4):
        raise ValueError(
            f"bottleneck features must have the shape [B, C, h, w] or [B, h, w], not {list(features.shape)}"
        )
    mean = features.mean(1) if features.ndim == 4 else features
    if mean.shape[1:] != (SIZE, SIZE):
        mean = F.adaptive_avg_pool2d(mean[:, None], SIZE)[:, 0]
    return mean.flatten(1)


def embed(sigma: Tensor) -> Tensor:
    """Sines, then cosines, of `sigma: [B]` at frequencies from 1 down to 1/10000: `[B, 8]`, float64."""
    half = NOISE_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float64, device=sigma.device) / (half - 1)
    phases = sigma.double()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1)
