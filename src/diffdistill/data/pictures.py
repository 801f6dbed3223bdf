"""The one reader of picture files: upright, 8 bits, grey or RGB, without transparency; errors name the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill.files.contents import is_junk

FOREIGN_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""What Pillow recognises but does not decode, or hands to another program, as PostScript to Ghostscript."""
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
FAULTS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(struct.error, zlib.error),
)
"""What the decoders of Pillow end in when a file is damaged."""


class PictureError(ValueError):
    """A picture that cannot be read: truncated, damaged or of an unknown format."""


@cache
def picture_formats() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.OPEN if name not in FOREIGN_FORMATS)


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of these formats, in lower case with their points."""
    from PIL import Image

    formats = picture_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture, and not of something that a system left."""
    path = Path(name)
    return path.suffix.lower() in picture_suffixes() and not is_junk(path.name)


@dataclass(frozen=True)
class PictureReader:
    """How pictures become arrays of bytes.

    Attributes:
        resolution: the shorter side is resized to this and the centre cropped; None takes pictures as they are.
        channels: 3 (RGB) or 1 (grey).
        background: what shows through where a picture is transparent: a name or code of a colour ("white", "#808080"),
            or three numbers from 0 to 255.
        enlarge: also resize pictures that are smaller than `resolution`, rather than refuse them.

    Raises:
        ValueError: an option out of range.
    """

    resolution: int | None = None
    channels: int = 3
    background: str | Sequence[int] = "white"
    enlarge: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {self.channels}")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution is at least 1 pixel, not {self.resolution}")
        object.__setattr__(self, "background", colour(self.background))

    def read(self, source: Path | bytes, name: str | None = None) -> np.ndarray:
        """A picture `[channels, H, W]` of bytes.

        Args:
            source: a file, or what it holds.
            name: what errors call it; by default the path.

        Raises:
            PictureError: it cannot be read.
            ValueError: it is smaller than the resolution.
        """
        name = str(source) if name is None else name
        image = self.open(source, name)
        if self.resolution is not None:
            if min(image.size) < self.resolution and not self.enlarge:
                size = f"{image.width}x{image.height}"
                raise ValueError(f"{name!r} is {size}, smaller than resolution {self.resolution}: give a lower one")
            image = fitted(image, (self.resolution, self.resolution))
        pixels = np.array(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def open(self, source: Path | bytes, name: str) -> Any:
        """A picture of Pillow in its own size, in the mode "RGB" or "L"; errors as of `read`."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
                image.load()
                return self._plain(_upright(image))
        except Image.UnidentifiedImageError:
            raise PictureError(f"cannot read {name!r}: it is no picture, or is damaged") from None
        except (*FAULTS, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PictureError(f"cannot read {name!r}: {reason}") from None

    def _plain(self, image: Any) -> Any:
        """The image in 8 bits, over the background, with the channels that are asked for."""
        from PIL import Image

        mode = "L" if self.channels == 1 else "RGB"
        if image.mode == mode and "transparency" not in image.info:
            return image
        if image.mode.startswith(("I", "F")):
            image = _in_bytes(image)
        if image.has_transparency_data:
            below = Image.new("RGBA", image.size, (*self.background, 255))  # pyright: ignore[reportArgumentType]
            image = Image.alpha_composite(below, image.convert("RGBA"))
        return image.convert(mode)


def _formats() -> list[str]:
    return list(picture_formats())


def colour(background: str | Sequence[int]) -> tuple[int, int, int]:
    """Three numbers from 0 to 255 for a colour, given by name, by code or by these.

    Raises:
        ValueError: no colour.
    """
    from PIL import ImageColor

    try:
        given = ImageColor.getrgb(background) if isinstance(background, str) else tuple(background)
    except (ValueError, TypeError):
        given = ()
    if len(given) == 3 and all(isinstance(value, int) and 0 <= value <= 255 for value in given):
        return given[0], given[1], given[2]
    raise ValueError(f"background is a colour, such as white, '#808080' or [128,128,128], but is {background!r}")


def fitted(image: Any, size: tuple[int, int]) -> Any:
    """An image of Pillow in `size = (width, height)`: its centre of this shape, resized with an antialiasing filter."""
    from PIL import Image

    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=centre_box(image.size, size))


def centre_box(given: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part of an image of `given` size with the shape of `size`, centred.

    Left and top are whole pixels, so that nothing is blurred where nothing is resized.
    """
    scale = min(given[0] / size[0], given[1] / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = (given[0] - width) // 2, (given[1] - height) // 2
    return left, top, left + width, top + height


def is_grey(source: Path | bytes) -> bool | None:
    """Whether a picture has grey values only, by its header; None where it cannot be told because it is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            return image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))
    except (*FAULTS, Image.DecompressionBombError):
        return None


def _upright(image: Any) -> Any:
    """The image turned as its EXIF says."""
    from PIL import ImageOps

    if "exif" in image.info or image.format in ("TIFF", "MPO"):
        return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    return image


def _in_bytes(image: Any) -> Any:
    """Grey values of 16 bits, or floats in [0, 1], as bytes, with alpha where one value stands for transparent."""
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    top = 1.0 if image.mode == "F" else 65535
    if not (low >= 0 and high <= top):
        raise ValueError(f"it holds values from {low:g} to {high:g}: expected at most 16 bits, or floats in [0, 1]")
    made = Image.fromarray((values / top * 255).round().astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        made.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return made
