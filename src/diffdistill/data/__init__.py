"""Image data sets behind one interface: map-style, float32 images in [-1, 1] and integer labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdistill.data.base import ImageData, MirroredData, TensorData
from diffdistill.data.cifar10 import CIFAR10, load_cifar10
from diffdistill.data.digits import Digits
from diffdistill.data.emoji import Emoji
from diffdistill.data.folders import ImageFolder, ZipData, load_images, load_samples, load_zip
from diffdistill.data.latents import LatentData
from diffdistill.data.shapes import SHAPES, Shapes
from diffdistill.registry import construct

DATA_SETS: dict[str, Callable[..., ImageData]] = {
    "cifar10": load_cifar10,
    "digits": Digits,
    "emoji": Emoji,
    "images": load_images,
    "latents": LatentData,
    "samples": load_samples,
    "shapes": Shapes,
    "zip": load_zip,
}


def load_data(name: str, **options: Any) -> ImageData:
    """Load a data set by name; `DATA_SETS` lists them.

    Raises:
        ValueError: an unknown name, an option out of range, or images of the wrong size.
        TypeError: an option that the data set does not have.
        FileNotFoundError: a folder or file that is not there.
    """
    return construct("data set", name, DATA_SETS, **options)


__all__ = [
    "CIFAR10",
    "DATA_SETS",
    "SHAPES",
    "Digits",
    "Emoji",
    "ImageData",
    "ImageFolder",
    "LatentData",
    "MirroredData",
    "Shapes",
    "TensorData",
    "ZipData",
    "load_data",
]
