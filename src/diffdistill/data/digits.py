"""The 1797 handwritten 8x8 digits that the package ships (its licence lies beside the file)."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import numpy as np
import torch

from diffdistill.data.base import TensorData, check_split, held_out


class Digits(TensorData):
    """Handwritten digits, `[1, 8, 8]`, 10 classes (Alpaydin and Kaynak 1998, doi 10.24432/C50P49).

    The 17 grey values 0 to 16 become `value / 8 - 1`.

    Args:
        split: "all" 1797 images; "test" every fifth image of each class (355 images); "train" the other 1442.
    """

    def __init__(self, *, split: Literal["all", "train", "test"] = "all") -> None:
        check_split(split, ("all", "train", "test"))
        with files("diffdistill.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["x"], arrays["y"].astype(np.int64)
        if split != "all":
            keep = held_out(labels) == (split == "test")
            images, labels = images[keep], labels[keep]
        x = torch.from_numpy(images).float()[:, None] / 8 - 1
        super().__init__(x, torch.from_numpy(labels), num_classes=10)
