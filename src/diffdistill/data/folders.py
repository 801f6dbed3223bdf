"""Image folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import ImageData, MirroredData, checked_index, from_uint8
from diffdistill.data.finding import find_pictures
from diffdistill.data.pictures import PictureError, PictureReader, is_grey

EXPECTED = "expected pictures, such as .png, .jpg or .tif"
ADVICE = "data.skip_damaged=true goes on without it"


class ImageFolder(ImageData):
    """Images of a folder; its sub-folders, where any holds some, are the classes (see `finding.find_pictures`).

    Args:
        root: the folder. A flat folder is a set without labels.
        resolution, background: as of `PictureReader`.
        channels: 3 (RGB), 1 (grey), or None: grey if all images are.
        skip_damaged: look at all images first, and leave out those that cannot be read.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an image that cannot be read, is smaller than `resolution`, or of another size than the first where
            that is None; an option out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        resolution: int | None = None,
        channels: int | None = 3,
        background: str | Sequence[int] = "white",
        skip_damaged: bool = False,
    ) -> None:
        PictureReader(resolution, channels or 3, background)  # a wrong option is better known before a search
        found = find_pictures(root)
        self._root = Path(root)
        paths = (self._root / name for name, _ in found.items)
        self._reader = PictureReader(resolution, channels or (1 if all_grey(paths) else 3), background)
        if skip_damaged:
            with ThreadPoolExecutor() as threads:
                sound = list(threads.map(self._is_sound, [name for name, _ in found.items]))
            damaged = [name for (name, _), good in zip(found.items, sound, strict=True) if not good]
            found = found.without("damaged", damaged)
        if not found.items:
            raise FileNotFoundError(f"no images in {str(root)!r}: {EXPECTED} ({found})")
        names, labels = zip(*found.items, strict=True)
        self.names = self._names = list(names)
        self._labels = torch.tensor(labels)
        self.num_classes, self.found = found.num_classes, str(found)
        _, height, width = self._read(names[0]).shape
        self.shape = (self._reader.channels, height, width)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.stack([checked_index(index, len(self))]).items()}

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        pixels = [self._read(self._names[i]) for i in indices]
        for i, image in zip(indices, pixels, strict=True):
            if image.shape != self.shape:
                raise other_size(str(self._root / self._names[i]), image.shape, self._names[0], self.shape)
        return {"x": from_uint8(np.stack(pixels)), "y": self._labels[list(indices)]}

    def _read(self, name: str) -> np.ndarray:
        try:
            return self._reader.read(self._root / name)
        except PictureError as error:
            raise PictureError(f"{error}; {ADVICE}") from None

    def _is_sound(self, name: str) -> bool:
        try:
            self._reader.open(self._root / name, name)
        except PictureError:
            return False
        return True


def all_grey(pictures: Iterable[Path | bytes]) -> bool:
    """Whether no picture has colours; those that are damaged do not count."""
    return all(is_grey(picture) is not False for picture in pictures)


def other_size(name: str, shape: Sequence[int], first: str, expected: Sequence[int]) -> ValueError:
    """What is raised for an image of another size than the first."""
    return ValueError(
        f"{name!r} has shape {list(shape)}, the first image {first!r} {list(expected)}: set resolution, to resize and "
        "crop all to one size"
    )


def load_images(
    *,
    root: str | Path,
    resolution: int | None = None,
    channels: int = 3,
    background: str | Sequence[int] = "white",
    skip_damaged: bool = False,
    flip: bool = False,
) -> ImageData:
    """Images of a folder (see `ImageFolder`); `flip` appends every image's mirror image."""
    data = ImageFolder(root, resolution=resolution, channels=channels, background=background, skip_damaged=skip_damaged)
    return MirroredData(data) if flip else data
