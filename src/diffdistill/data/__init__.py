"""Image data sets behind one interface: map-style, float32 images in [-1, 1] and integer labels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from diffdistill.data.archives import ZipData, load_zip
from diffdistill.data.arrays import load_samples
from diffdistill.data.base import ImageData, MirroredData, TensorData
from diffdistill.data.cifar10 import CIFAR10, load_cifar10
from diffdistill.data.digits import Digits
from diffdistill.data.emoji import Emoji
from diffdistill.data.folders import ImageFolder, load_images
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
    """Load a data set by name; `DATA_SETS` lists them. What was found in a folder or an archive is said in the log.

    Raises:
        ValueError: an unknown name, an option out of range, or images of the wrong size.
        TypeError: an option that the data set does not have.
        FileNotFoundError: a folder or file that is not there.
    """
    data = construct("data set", name, DATA_SETS, **options)
    say_what_was_found(data)
    return data


def say_what_was_found(data: ImageData) -> None:
    """Write in the log, in one line, what a set was made of and what was skipped."""
    if data.found is not None:
        logging.getLogger("diffdistill").info("%s", data.found)


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
    "say_what_was_found",
]
