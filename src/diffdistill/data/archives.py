"""Zip archives of images in the layout of EDM (Karras et al. 2022)."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import ImageData, MirroredData, check_range, checked_index, from_uint8
from diffdistill.data.finding import Found, in_order
from diffdistill.data.folders import ADVICE, EXPECTED, all_grey, other_size
from diffdistill.data.pictures import PictureError, PictureReader, is_picture
from diffdistill.denoiser import NULL_LABEL
from diffdistill.files.contents import is_junk

TABLE = "dataset.json"


class ZipData(ImageData):
    """A zip of images with labels in `dataset.json`, as EDM's `dataset_tool.py` writes it.

    `dataset.json` reads `{"labels": [["00000/img00000000.png", 3], ...]}`; without it, or without `labels` in it, the
    set has no labels. An image is a picture of any format that Pillow decodes, or an `.npy` `[C, H, W]` of bytes or of
    floats in [-1, 1]. Images are read when asked for; every process opens the archive for itself.

    Args:
        path: the archive.
        resolution: height and width that images must have; None takes those of the first.
        background: as of `PictureReader`.
        skip_damaged: look at all images first, and leave out those that cannot be read.

    Raises:
        FileNotFoundError: no such file, or no images in it.
        ValueError: not a zip archive, a missing or non-integer label, an image that cannot be read, or one of another
            size or range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resolution: int | None = None,
        background: str | Sequence[int] = "white",
        skip_damaged: bool = False,
    ) -> None:
        self.path = Path(path)
        self._reader = PictureReader(background=background)
        if not self.path.is_file():
            raise FileNotFoundError(f"no zip data set at {str(path)!r}: make one with dataset_tool.py of EDM")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{str(path)!r} is not a zip archive")
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        found = self._find()
        if skip_damaged:
            found = found.without("damaged", [name for name, _ in found.items if not self._is_sound(name)])
        if not found.items:
            raise FileNotFoundError(f"no images in {str(path)!r}: {EXPECTED}, or .npy ({found})")
        names, labels = zip(*found.items, strict=True)
        self.names = self._names = list(names)
        self._labels, self.found = torch.tensor(labels), str(found)
        self.num_classes = int(self._labels.max()) + 1
        pictures = [name for name in names if not _is_array(name)]
        if len(pictures) == len(names) and all_grey(self._open().read(name) for name in pictures):
            self._reader = PictureReader(channels=1, background=background)
        channels, height, width = self._read(names[0]).shape
        if resolution is not None and (height, width) != (resolution, resolution):
            raise ValueError(f"{str(path)!r} holds images of {width}x{height}, not {resolution}x{resolution}")
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = checked_index(index, len(self))
        x = self._read(self._names[index])
        if tuple(x.shape) != self.shape:
            raise other_size(self._names[index], x.shape, self._names[0], self.shape)
        return {"x": x, "y": self._labels[index]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _open(self) -> zipfile.ZipFile:
        # A handle inherited through fork shares its file position with the parent, hence the owner.
        if self._archive is None or self._owner != os.getpid():
            self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def _find(self) -> Found:
        """The images of the archive, and what else is in it."""
        skipped: dict[str, list[str]] = {}
        images = []
        listed = [name for name in self._open().namelist() if not name.endswith("/") and name != TABLE]
        for name in in_order(listed):
            if any(map(is_junk, Path(name).parts)):
                skipped.setdefault("left by a system", []).append(name)
            elif is_picture(name) or _is_array(name):
                images.append(name)
            else:
                skipped.setdefault("no picture by its name", []).append(name)
        table = self._read_table() if TABLE in self._open().namelist() else None
        labels = dict.fromkeys(images, NULL_LABEL) if table is None else self._labels_of(table, images)
        return Found(str(self.path), list(labels.items()), {}, skipped)

    def _read_table(self) -> dict[str, Any] | None:
        try:
            table = json.loads(self._open().read(TABLE)).get("labels")
            return None if table is None else dict(table)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f'{TABLE} of {str(self.path)!r} is not {{"labels": [[name, label], ...]}}') from None

    def _labels_of(self, labels: dict[str, Any], images: Sequence[str]) -> dict[str, int]:
        missing = next((name for name in images if name not in labels), None)
        if missing is not None:
            raise ValueError(f"{TABLE} of {str(self.path)!r} has no label for {missing!r}")
        wrong = next((n for n in images if not isinstance(labels[n], int) or labels[n] < 0), None)
        if wrong is not None:
            raise ValueError(f"label {labels[wrong]!r} of {wrong!r} is not a non-negative integer")
        return {name: labels[name] for name in images}

    def _is_sound(self, name: str) -> bool:
        try:
            self._read(name)
        except PictureError:
            return False
        return True

    def _read(self, name: str) -> Tensor:
        place = f"{self.path}/{name}"
        try:
            content = self._open().read(name)
            values = np.load(io.BytesIO(content), allow_pickle=False) if _is_array(name) else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise PictureError(f"cannot read {place!r}: {error}; {ADVICE}") from error
        if values is None:
            try:
                return from_uint8(self._reader.read(content, place))
            except PictureError as error:
                raise PictureError(f"{error}; {ADVICE}") from None
        if values.ndim != 3:
            raise ValueError(f"{name!r} has shape {list(values.shape)}: expected [C, H, W]")
        if values.dtype == np.uint8:
            return from_uint8(values)
        x = torch.from_numpy(values.astype(np.float32))
        check_range(x, repr(name))
        return x


def _is_array(name: str) -> bool:
    return name.lower().endswith(".npy")


def load_zip(
    *,
    path: str | Path,
    resolution: int | None = None,
    background: str | Sequence[int] = "white",
    skip_damaged: bool = False,
    flip: bool = False,
) -> ImageData:
    """Images of a zip archive (see `ZipData`); `flip` appends every image's mirror image."""
    data = ZipData(path, resolution=resolution, background=background, skip_damaged=skip_damaged)
    return MirroredData(data) if flip else data
