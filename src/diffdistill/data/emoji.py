"""The 1873 emoji graphics that the package ships (their licence lies beside the file; `emoji_source` makes it)."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from diffdistill.data.base import TensorData, check_split, from_uint8, held_out

CLASSES = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
"""What the labels 0 to 8 mean."""
RESOLUTIONS = (16, 32)


class Emoji(TensorData):
    """Twemoji graphics over neutral grey, `[3, 32, 32]` or `[3, 16, 16]`, 9 classes (Twitter and contributors).

    One of each without skin tones. Grey, where there is no emoji, is 0.

    Args:
        split: "all"; "test" every fifth image of each class; "train" the others.
        resolution: height and width, 32 or 16 (the means of 2x2 pixels).

    Raises:
        ValueError: a split or a resolution that there is not.
    """

    def __init__(self, *, split: Literal["all", "train", "test"] = "all", resolution: int = 32) -> None:
        check_split(split, ("all", "train", "test"))
        if resolution not in RESOLUTIONS:
            valid = ", ".join(str(size) for size in RESOLUTIONS)
            raise ValueError(f"emoji have no resolution {resolution}: choose one of {valid}")
        with files("diffdistill.data").joinpath("emoji.npz").open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["x"], arrays["y"].astype(np.int64)
        if split != "all":
            keep = held_out(labels) == (split == "test")
            images, labels = images[keep], labels[keep]
        x = avg_pool2d(from_uint8(images).permute(0, 3, 1, 2), max(RESOLUTIONS) // resolution)
        super().__init__(x, torch.from_numpy(labels), num_classes=len(CLASSES))
