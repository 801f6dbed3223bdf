"""Feature extractors behind one interface: images `[B, C, H, W]` in [-1, 1] to features `[B, D]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from diffdistill.evaluation.classifier import load_classifier
from diffdistill.evaluation.frechet import FeatureStatistics, Gaussian
from diffdistill.registry import construct


class Features(Protocol):
    """A feature extractor. `name` is written beside statistics, so that only like is compared with like."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """Features `[B, D]` of images `[B, C, H, W]`."""
        ...


class Pixels:
    """The image itself, flattened."""

    name = "pixels"

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class DigitsClassifierFeatures:
    """The last hidden layer of the shipped digit classifier: 64 features of 8x8 digits."""

    name = "digits_classifier"

    def __init__(self) -> None:
        self._model = load_classifier()

    def __call__(self, x: Tensor) -> Tensor:
        return self._model.to(x.device).features(x.float())


FEATURES: dict[str, Callable[..., Features]] = {
    "pixels": Pixels,
    "digits_classifier": DigitsClassifierFeatures,
}


def make_features(name: str, **options: Any) -> Features:
    """Build a feature extractor by name; `FEATURES` lists them."""
    return construct("feature extractor", name, FEATURES, **options)


@torch.no_grad()
def extract(features: Features, x: Tensor, *, batch_size: int = 512) -> Tensor:
    """Features `[N, D]` of all images `[N, C, H, W]`, in float64."""
    return torch.cat([features(part).double() for part in x.split(batch_size)])


@torch.no_grad()
def gaussian_of(features: Features, x: Tensor, *, batch_size: int = 512) -> Gaussian:
    """The Gaussian fitted to the features of images `[N, C, H, W]`."""
    statistics = FeatureStatistics()
    for part in x.split(batch_size):
        statistics.update(features(part))
    return statistics.gaussian()
