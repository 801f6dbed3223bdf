"""Distances in the features of a network, on decoded images, beside that of states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.registry import construct

Extractor = Callable[[Tensor], Tensor]

DIFFERENTIABLE: dict[str, Callable[..., Extractor] | str] = {
    "digits_classifier": "diffdistill.metrics.features:DigitsClassifierFeatures",
    "emoji_classifier": "diffdistill.metrics.features:EmojiClassifierFeatures",
    "pixels_8x8": "diffdistill.metrics.features:Blocks",
    "dinov2": "diffdistill.metrics.differentiable:SmoothDINOv2",
    "lpips": "diffdistill.metrics.differentiable:LPIPS",
}
"""Extractors whose features are differentiable: images `[B, C, H, W]` in [-1, 1] to `[B, D]`."""


@dataclass(frozen=True)
class FeatureDistance:
    """A distance of images in the features of a network, beside that of states.

    Attributes:
        features: differentiable, images `[B, C, H, W]` to features `[B, D]`.
        weight: that the distance of features is given; the distance of states has the weight 1 - `weight`.
        decode: states to images, such as the decoder of a latent model.
    """

    features: Extractor
    weight: float = 0.5
    decode: Callable[[Tensor], Tensor] = lambda x: x

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"the weight of a distance in features must lie in (0, 1], but is {self.weight!r}")

    def pair(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The features of both, `[B, D]`; gradients reach `x` alone."""
        with torch.no_grad():
            wanted = self.features(self.decode(target))
        return self.features(self.decode(x)), wanted


def feature_distance(denoiser: Denoiser, *, name: str, weight: float = 0.5, **options: Any) -> FeatureDistance:
    """The distance of what a denoiser samples in the features of an extractor, by name.

    Args:
        denoiser: its codec, if it has one, decodes.
        name: one of `DIFFERENTIABLE`.
        weight: of the distance of features, in (0, 1].
        options: of the extractor.

    Raises:
        ValueError: an unknown name, or a weight out of range.
        ImportError: an optional package is missing; the message names the extra to install.
    """
    features = construct("differentiable feature extractor", name, DIFFERENTIABLE, **options)
    codec = getattr(denoiser, "codec", None)
    return FeatureDistance(features, weight) if codec is None else FeatureDistance(features, weight, codec.decode)
