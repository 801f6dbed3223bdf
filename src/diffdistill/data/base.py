"""What a data set is: images in [-1, 1] with class labels, addressed by an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

HELD_OUT_PERIOD = 5
"""Of the sets that come with the package, every fifth image of each class is held out."""


class ImageData(Dataset[dict[str, Tensor]]):
    """A map-style data set: `data[i]` is `{"x": float32 [C, H, W] in [-1, 1], "y": long scalar}`.

    Item `i` depends on `i` alone, so that any order of access and any number of workers give the same items.

    Attributes:
        shape: `(C, H, W)` of every image.
        num_classes: number of class labels, 0 for a set without labels (then y is -1).
        autoencoder: for latents, the file of what turns them into images, if it is known.
        found: what was found where the set was looked for, in one line, and what was skipped; None for other sets.
        names: of the images, where they have any: paths below the folder of the set.
    """

    shape: tuple[int, int, int]
    num_classes: int = 0
    autoencoder: Path | None = None
    found: str | None = None
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} defines no __len__")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} defines no __getitem__")

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Some of the set: `{"x": float32 [n, C, H, W], "y": long [n]}`."""
        items = [self[i] for i in indices]
        return {name: torch.stack([item[name] for item in items]) for name in ("x", "y")}

    def tensors(self) -> dict[str, Tensor]:
        """The whole set in memory: `{"x": float32 [N, C, H, W], "y": long [N]}`."""
        return self.stack(range(len(self)))


class TensorData(ImageData):
    """Images that lie in memory.

    Args:
        x: float32 `[N, C, H, W]` in [-1, 1].
        y: long `[N]`, in `[0, num_classes)`.
        num_classes: number of class labels.

    Raises:
        ValueError: shapes that do not match, or values outside the range.
    """

    def __init__(self, x: Tensor, y: Tensor, *, num_classes: int) -> None:
        if x.ndim != 4 or y.shape != x.shape[:1]:
            raise ValueError(f"images are [N, C, H, W] with labels [N], not {list(x.shape)} with {list(y.shape)}")
        check_range(x)
        self.x, self.y = x.float(), y.long()
        self.shape = (x.shape[1], x.shape[2], x.shape[3])
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        return {"x": self.x[chosen], "y": self.y[chosen]}

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}


class MirroredData(ImageData):
    """A set and its mirror images: twice as long, item `N + i` is item `i` flipped left to right.

    This is how horizontal flips enter training: as items of the set, without randomness of their own.
    """

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.shape, self.num_classes, self.found = data.shape, data.num_classes, data.found

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = checked_index(index, len(self))
        item = self.data[index % len(self.data)]
        return item if index < len(self.data) else {**item, "x": item["x"].flip(-1)}

    def tensors(self) -> dict[str, Tensor]:
        x, y = self.data.tensors().values()
        return {"x": torch.cat([x, x.flip(-1)]), "y": torch.cat([y, y])}


def checked_index(index: int, length: int) -> int:
    """`index` counted from the front; raises `IndexError` outside `[-length, length)`."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is outside a set of {length} images")
    return index % length


def check_range(x: Tensor, source: str = "images") -> None:
    """Raise `ValueError` unless every value of `x` lies in [-1, 1] (which excludes NaN)."""
    if x.numel() and not bool(((x >= -1) & (x <= 1)).all()):
        raise ValueError(f"{source}: values must lie in [-1, 1], but span [{float(x.min()):g}, {float(x.max()):g}]")


def from_uint8(values: np.ndarray) -> Tensor:
    """Map bytes 0 to 255 to float32 in [-1, 1]: `value / 127.5 - 1`, any shape."""
    return torch.from_numpy(np.ascontiguousarray(values)).float() / 127.5 - 1


def check_split(split: str, valid: tuple[str, ...]) -> str:
    """Return `split`; raise a `ValueError` that lists `valid` if it is not among them."""
    if split not in valid:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(valid)}")
    return split


def held_out(labels: np.ndarray) -> np.ndarray:
    """Boolean `[N]`: the last of every `HELD_OUT_PERIOD` consecutive images of the same class."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[HELD_OUT_PERIOD - 1 :: HELD_OUT_PERIOD]] = True
    return test
