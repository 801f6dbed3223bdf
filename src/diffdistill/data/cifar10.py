"""CIFAR-10 through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import ImageData, MirroredData, check_split, from_uint8


class CIFAR10(ImageData):
    """CIFAR-10, `[3, 32, 32]`, 10 classes, held in memory as bytes.

    torchvision compares the files with their published checksums before it reads them.

    Args:
        root: folder that holds `cifar-10-batches-py`.
        split: "train" 50 000 images, "test" 10 000.
        download: fetch the files if they are not there.

    Raises:
        FileNotFoundError: the files are absent or damaged, and `download` is False.
    """

    shape = (3, 32, 32)
    num_classes = 10

    def __init__(self, root: str | Path, *, split: Literal["train", "test"] = "train", download: bool = False) -> None:
        from torchvision import datasets

        check_split(split, ("train", "test"))
        try:
            source = datasets.CIFAR10(str(root), train=split == "train", download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no intact CIFAR-10 in {str(root)!r}: download=True (data.download=true) fetches it"
            ) from error
        self._images: np.ndarray = source.data
        self._labels = torch.as_tensor(source.targets)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": from_uint8(self._images[index].transpose(2, 0, 1)), "y": self._labels[index]}

    def tensors(self) -> dict[str, Tensor]:
        return {"x": from_uint8(self._images.transpose(0, 3, 1, 2)), "y": self._labels}


def load_cifar10(
    *, root: str | Path, split: Literal["train", "test"] = "train", download: bool = False, flip: bool = False
) -> ImageData:
    """CIFAR-10 (see `CIFAR10`); `flip` appends every image's mirror image."""
    data = CIFAR10(root, split=split, download=download)
    return MirroredData(data) if flip else data
