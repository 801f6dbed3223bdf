"""Pictures of any size to edit, masks for them, and results in the size that they had."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import from_uint8
from diffdistill.data.finding import find_pictures
from diffdistill.data.folders import EXPECTED
from diffdistill.data.pictures import PictureReader, centre_box, fitted
from diffdistill.reports.pictures import save_grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to edit, in its own size.

    Attributes:
        name: its path below the folder that was asked for.
        pixels: bytes `[C, H, W]`.
    """

    name: str
    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def fitted(self, size: tuple[int, ...]) -> Tensor:
        """Its centre in the shape of `size = (H, W)`, resized to it: `[C, H, W]` in [-1, 1]."""
        return from_uint8(_channels_first(fitted(_image(self.pixels), _turned(size))))


def read_pictures(
    path: str | os.PathLike[str], *, channels: int = 3, background: str | Sequence[int] = "white"
) -> list[Picture]:
    """One picture, or all of a folder and those within it in natural order.

    Args:
        path: a file or a folder.
        channels: as of `PictureReader`.
        background: as of `PictureReader`.

    Raises:
        FileNotFoundError: no such file or folder, or no pictures in it.
        ValueError: a picture that cannot be read.
    """
    path, reader = Path(path), PictureReader(channels=channels, background=background)
    if path.is_dir():
        names = [name for name, _ in find_pictures(path, classes=False).items]
        places = {name: path / name for name in names}
    else:
        places = {path.name: path} if path.is_file() else {}
    if not places:
        raise FileNotFoundError(f"no images at {str(path)!r}: give a file or a folder; {EXPECTED}")
    return [Picture(name, reader.read(place)) for name, place in places.items()]


def first_pictures(pictures: list[Picture], count: int | None) -> list[Picture]:
    """The first `count` pictures, or all for None.

    Raises:
        ValueError: there are fewer.
    """
    if count is not None and not 1 <= count <= len(pictures):
        raise ValueError(f"num_images={count}: there are {len(pictures)} pictures")
    return pictures[:count]


def read_masks(
    path: str | os.PathLike[str] | None, pictures: Sequence[Picture], size: tuple[int, ...]
) -> list[np.ndarray]:
    """Black and white pictures as masks: for each picture `[H, W]`, in its own size or `size`, True where it is white.

    White is what shall be made, as in the pipelines of diffusers. One file serves all pictures; those of a folder go
    with the pictures of their names, or, where no name fits, in natural order. None makes the right half.

    Args:
        path: a file, a folder, or None.
        pictures: what is edited.
        size: height and width of what the model takes.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a mask of another size than its picture and `size`, or a folder whose masks fit neither by name nor
            by number.
    """
    if path is None:
        return [right_half(size)] * len(pictures)
    masks = read_pictures(path, channels=1, background="black")
    chosen = masks * len(pictures) if not Path(path).is_dir() else _paired(masks, pictures, path)
    for mask, picture in zip(chosen, pictures, strict=True):
        if mask.size not in (picture.size, _turned(size)):
            raise ValueError(
                f"the mask {mask.name!r} is {_by(mask.size)}, but {picture.name!r} is {_by(picture.size)} and the "
                f"model takes {_by(_turned(size))}"
            )
    return [mask.pixels[0] >= 128 for mask in chosen]


def right_half(size: tuple[int, ...]) -> np.ndarray:
    """The mask `[H, W]` of the right half."""
    return np.broadcast_to(np.arange(size[1]) >= size[1] // 2, size)


def _paired(masks: Sequence[Picture], pictures: Sequence[Picture], path: Any) -> list[Picture]:
    by_stem = {Path(mask.name).stem: mask for mask in masks}
    found = [by_stem.get(Path(picture.name).stem) for picture in pictures]
    if not any(found) and len(masks) == len(pictures):
        return list(masks)
    missing = next((picture.name for picture, mask in zip(pictures, found, strict=True) if mask is None), None)
    if missing is not None:
        raise ValueError(
            f"{os.fspath(path)!r} has no mask for {missing!r}: name masks like the images, or give as many (there are "
            f"{len(masks)} for {len(pictures)} images)"
        )
    return [mask for mask in found if mask is not None]


def known_of(mask: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Where a picture is known once it is resized to `size = (H, W)`: `[1, H, W]`, 1 where no pixel is to be made."""
    from PIL import Image

    white = Image.fromarray(mask.astype(np.uint8) * 255)
    if white.size != _turned(size):
        box = centre_box(white.size, _turned(size))
        white = white.resize(_turned(size), Image.Resampling.BOX, box=box)
    return torch.from_numpy(np.array(white) == 0).float()[None]


def in_own_size(picture: Picture, made: Tensor, mask: np.ndarray | None = None) -> Tensor:
    """An edited picture in the size that it had: what was edited is put back where it was cut out.

    Args:
        picture: before.
        made: its centre after, `[C, h, w]` in [-1, 1].
        mask: for inpainting, where it was to be made; all else keeps its very bytes.

    Returns:
        `[C, H, W]` in [-1, 1], exactly that of bytes.
    """
    from PIL import Image

    left, top, right, bottom = map(round, centre_box(picture.size, (made.shape[2], made.shape[1])))
    place = (right - left, bottom - top)
    centre = _image(in_bytes(made))
    if centre.size != place:
        centre = centre.resize(place, Image.Resampling.BICUBIC)
    result = picture.pixels.copy()
    result[:, top:bottom, left:right] = _channels_first(centre)
    if mask is not None:
        if mask.shape != picture.pixels.shape[1:]:  # one of the size of the model
            small = Image.fromarray(mask).resize(place, Image.Resampling.NEAREST)
            mask = np.zeros(picture.pixels.shape[1:], bool)
            mask[top:bottom, left:right] = np.array(small)
        result = np.where(mask, result, picture.pixels)
    return from_uint8(result)


@dataclass(frozen=True, eq=False)
class Edited:
    """What an edit led to.

    Attributes:
        rows: images `[B, C, H, W]` in [-1, 1] by what they are: `before`, `known` for inpainting, and `after`.
        pictures: what was edited.
        masks: for inpainting, one for each picture.
    """

    rows: dict[str, Tensor]
    pictures: Sequence[Picture]
    masks: Sequence[np.ndarray]

    def save(self, folder: Path, *, own_size: bool) -> Path:
        """Write each result as a PNG of its picture's name, in the model's size or in its own; returns the folder."""
        stems = [str(Path(picture.name).with_suffix("")) for picture in self.pictures]
        for i, picture in enumerate(self.pictures):
            made, mask = self.rows["after"][i], self.masks[i] if self.masks else None
            result = in_own_size(picture, made, mask) if own_size else made
            name = stems[i] if stems.count(stems[i]) == 1 else picture.name
            save_grid(result[None], folder / f"{name}.png", columns=1, scale=1)
        return folder


def pictures_of(images: Tensor) -> list[Picture]:
    """Images `[B, C, H, W]` of a data set, under their numbers."""
    return [Picture(f"{i:06d}.png", in_bytes(image)) for i, image in enumerate(images)]


def say_what_is_cut(pictures: Sequence[Picture], masks: Sequence[np.ndarray], size: tuple[int, ...]) -> None:
    """Write in the log which part of each picture is edited, where that is not all of it in its own size."""
    for picture, mask in zip(pictures, masks or [None] * len(pictures), strict=True):
        if picture.size != _turned(size):
            left, top, right, bottom = map(round, centre_box(picture.size, _turned(size)))
            logger.info(
                "%s is %s: its centre of %s is resized to %s",
                *(picture.name, _by(picture.size), _by((right - left, bottom - top)), _by(_turned(size))),
            )
            if mask is not None and mask.shape != size and mask.sum() > mask[top:bottom, left:right].sum():
                logger.warning("%s: what its mask marks outside that part is not edited", picture.name)


def in_bytes(image: Tensor) -> np.ndarray:
    """An image `[C, H, W]` in [-1, 1] as bytes."""
    return ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def _turned(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width as width and height."""
    return size[1], size[0]


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def _image(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _channels_first(image: Any) -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
