"""Image data sets behind one interface: map-style, float32 images in [-1, 1] and integer labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from diffdistill.data.archives import ZipData, load_zip
from diffdistill.data.arrays import load_samples
from diffdistill.data.base import ImageData, MirroredData, TensorData
from diffdistill.data.cifar10 import CIFAR10, load_cifar10
from diffdistill.data.digits import Digits
from diffdistill.data.emoji import Emoji
from diffdistill.data.folders import ImageFolder, load_images
from diffdistill.data.given import Data, as_data, check_data, say_what_was_found
from diffdistill.data.latents import LatentData
from diffdistill.data.shapes import SHAPES, Shapes
from diffdistill.registry import construct, enter

DATA_SETS: dict[str, Callable[..., Any]] = {
    "cifar10": load_cifar10,
    "digits": Digits,
    "emoji": Emoji,
    "images": load_images,
    "latents": LatentData,
    "samples": load_samples,
    "shapes": Shapes,
    "zip": load_zip,
}


D = TypeVar("D", bound=Callable[..., Any])


def register_data(name: str) -> Callable[[D], D]:
    """A decorator that gives a data set, a class or a function that makes one, a name for `load_data` and configs.

    It may be any that `as_data` takes: a map-style data set of tensors, pairs or dicts, or such tensors themselves.

    Raises:
        ValueError: the name is taken, or is no word.
    """

    def decorate(make: D) -> D:
        enter("data set", name, DATA_SETS, make)
        return make

    return decorate


def load_data(name: str, **options: Any) -> Data:
    """Load a data set by name; `DATA_SETS` lists them. What was found in a folder or an archive is said in the log.

    Raises:
        ValueError: an unknown name, an option out of range, or images of the wrong size.
        TypeError: an option that the data set does not have.
        FileNotFoundError: a folder or file that is not there.
    """
    data = as_data(construct("data set", name, DATA_SETS, **options))
    say_what_was_found(data)
    return data


__all__ = [
    "CIFAR10",
    "DATA_SETS",
    "SHAPES",
    "Data",
    "Digits",
    "Emoji",
    "ImageData",
    "ImageFolder",
    "LatentData",
    "MirroredData",
    "Shapes",
    "TensorData",
    "ZipData",
    "as_data",
    "check_data",
    "load_data",
    "register_data",
    "say_what_was_found",
]
