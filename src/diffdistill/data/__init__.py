"""Image data sets behind one interface: map-style, float32 images in [-1, 1] and integer labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdistill.data.base import ImageData, MirroredData, TensorData
from diffdistill.data.digits import Digits
from diffdistill.registry import construct

DATA_SETS: dict[str, Callable[..., ImageData]] = {
    "digits": Digits,
}


def load_data(name: str, **options: Any) -> ImageData:
    """Load a data set by name; `DATA_SETS` lists them.

    Raises:
        ValueError: an unknown name, an option out of range, or images of the wrong size.
        TypeError: an option that the data set does not have.
        FileNotFoundError: a folder or file that is not there.
    """
    return construct("data set", name, DATA_SETS, **options)


__all__ = ["DATA_SETS", "Digits", "ImageData", "MirroredData", "TensorData", "load_data"]
