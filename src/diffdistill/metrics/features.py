"""What a feature extractor is, from images `[B, C, H, W]` in [-1, 1] to features `[B, D]`, and those of our own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffdistill.metrics.classifier import Subject, load_classifier
from diffdistill.metrics.frechet import FeatureStatistics, Gaussian
from diffdistill.models.loading import fingerprint


class Features(ABC):
    """A feature extractor.

    Attributes:
        name: written beside statistics, so that only like is compared with like.
        weights: hash of the weights, or None where there are none; it is written beside the name.
        num_classes: classes that the logits stand for, in the order of the labels; 0 if they stand for others or
            there are none.
    """

    name: str
    num_classes: int = 0

    @property
    def weights(self) -> str | None:
        return None

    @abstractmethod
    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features `[B, D]` of images `[B, C, H, W]`, and the logits `[B, K]` of a classifier, or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """Features `[B, D]` of images `[B, C, H, W]`."""
        return self.both(x)[0]


class Pixels(Features):
    """The image itself, flattened."""

    name = "pixels"

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x.flatten(1), None


class Blocks(Features):
    """The means of 8x8 equal blocks of the image: a few features, whose covariance a thousand images determine."""

    name = "pixels_8x8"

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return adaptive_avg_pool2d(x, 8).flatten(1), None


class ClassifierFeatures(Features):
    """The last hidden layer of a shipped classifier."""

    subject: Subject

    def __init__(self) -> None:
        self._model = load_classifier(subject=self.subject)
        self.num_classes = self._model.task.num_classes

    @property
    def weights(self) -> str | None:
        return fingerprint(self._model)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self._model.to(x.device)
        features = model.features(x.float())
        return features, model.head(features)


class ClassifiedPixels(ClassifierFeatures):
    """The pixels as features, with the logits of a shipped classifier."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x.flatten(1), super().both(x)[1]


class DigitsClassifierFeatures(ClassifierFeatures):
    """64 features of 8x8 digits."""

    name = "digits_classifier"
    subject = "digits"


class DigitPixels(ClassifiedPixels):
    """The 64 pixels of 8x8 digits."""

    name = "digit_pixels"
    subject = "digits"


class EmojiClassifierFeatures(ClassifierFeatures):
    """96 features of 16x16 emoji."""

    name = "emoji_classifier"
    subject = "emoji"


class EmojiPixels(ClassifiedPixels):
    """The 768 values of 16x16 emoji."""

    name = "emoji_pixels"
    subject = "emoji"


def to_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] as the bytes that an image file would hold, RGB: uint8 `[B, 3, H, W]`."""
    x = (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


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
