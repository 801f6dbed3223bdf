"""Images side by side as one picture. Pillow is imported where it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.files.atomic import replacing

CAPTION_SIZE = 14
GAP = 2


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> None:
    """Write images as one PNG, row by row; grey ones make a grey picture, unless it has captions.

    Args:
        images: `[N, C, H, W]` in [-1, 1] (values outside are clipped), with one or three channels.
        path: the file.
        columns: images per row; the square root of N if not given.
        scale: each pixel becomes `scale x scale` pixels; if not given, small images are enlarged to about 48 pixels.
        row_captions: text left of the rows.
        column_captions: text above the columns.

    Raises:
        ValueError: images of another shape.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs images [N, 1 or 3, H, W], not {list(images.shape)}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or max(1, round(48 / max(images.shape[2:])))
    # Not torchvision's make_grid: it adds a frame, but not around a single image, and makes grey images RGB.
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    canvas = np.full((-(-len(pixels) // columns) * height - GAP, columns * width - GAP, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height - GAP, left : left + width - GAP] = image
    grid = Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas)
    _save_captioned(grid, path, (width, height), row_captions, column_captions)


def save_mosaic(
    parts: Sequence[Sequence[Any]],
    path: str | os.PathLike[str],
    *,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> None:
    """Write pictures as one PNG, row by row.

    Args:
        parts: rows of PIL images, None for a place that stays empty; at least one image.
        path: the file.
        row_captions: text left of the rows.
        column_captions: text above the columns.
    """
    from PIL import Image

    images = [part for row in parts for part in row if part is not None]
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    cell = width + 6 * GAP, height + GAP
    canvas = Image.new("RGB", (max(map(len, parts)) * cell[0] - 6 * GAP, len(parts) * cell[1] - GAP), "white")
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            if part is not None:
                canvas.paste(part, (j * cell[0], i * cell[1]))
    _save_captioned(canvas, path, cell, row_captions, column_captions)


def _save_captioned(
    grid: Any, path: str | os.PathLike[str], cell: tuple[int, int], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Write a grid with captions in a margin to its left and above it."""
    from PIL import Image, ImageDraw, ImageFont

    picture = grid
    if rows or columns:
        font: Any = ImageFont.load_default(CAPTION_SIZE)
        left = max((math.ceil(font.getlength(text)) for text in rows), default=0) + (12 if rows else 0)
        top = CAPTION_SIZE + 10 if columns else 0
        picture = Image.new("RGB", (grid.width + left, grid.height + top), "white")
        picture.paste(grid, (left, top))
        draw = ImageDraw.Draw(picture)
        for i, text in enumerate(rows):
            draw.text((left - 6, top + (i + 0.5) * cell[1]), text, fill="black", font=font, anchor="rm")
        for i, text in enumerate(columns):
            draw.text((left + (i + 0.5) * cell[0], top / 2), text, fill="black", font=font, anchor="mm")
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
