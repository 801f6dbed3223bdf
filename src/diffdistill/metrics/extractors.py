"""All feature extractors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdistill.metrics.features import (
    Blocks,
    DigitPixels,
    DigitsClassifierFeatures,
    EmojiClassifierFeatures,
    EmojiPixels,
    Features,
    Pixels,
)
from diffdistill.metrics.networks import DINOv2, Inception
from diffdistill.registry import construct

FEATURES: dict[str, Callable[..., Features]] = {
    "pixels": Pixels,
    "pixels_8x8": Blocks,
    "digit_pixels": DigitPixels,
    "digits_classifier": DigitsClassifierFeatures,
    "emoji_classifier": EmojiClassifierFeatures,
    "emoji_pixels": EmojiPixels,
    "inception": Inception,
    "dinov2": DINOv2,
}


def make_features(name: str, **options: Any) -> Features:
    """Build a feature extractor by name; `FEATURES` lists them.

    Raises:
        ValueError: an unknown name.
        TypeError: an option that the extractor does not have.
        ImportError: an optional package is missing; the message names the extra to install.
        FileNotFoundError: its weights are not there and cannot be fetched.
    """
    return construct("feature extractor", name, FEATURES, **options)
