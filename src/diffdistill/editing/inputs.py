"""Pictures and masks from files, checked against what a model takes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.files import IMAGE_SUFFIXES


def read_images(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Tensor:
    """One image, or all of a folder in the order of their names, `[B, C, H, W]` in [-1, 1].

    Raises:
        FileNotFoundError: no such file or folder, or no images in it.
        ValueError: an image of another size than `shape = (C, H, W)`.
    """
    from PIL import Image

    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"no images at {str(path)!r}: give a file or a folder of {', '.join(IMAGE_SUFFIXES)}")
    images = []
    for file in files:
        with Image.open(file) as opened:
            pixels = np.array(opened.convert("L" if shape[0] == 1 else "RGB"))
        if pixels.shape[:2] != shape[1:]:
            wanted = f"{shape[2]}x{shape[1]}"
            raise ValueError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, but the model takes images of {wanted}")
        images.append(torch.from_numpy(pixels).reshape(*shape[1:], shape[0]).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(images)


def read_mask(path: str | os.PathLike[str] | None, size: tuple[int, int]) -> Tensor:
    """A black and white picture as the mask of what is known: `[1, 1, H, W]`, 1 where it is black.

    White is what shall be made, as in the pipelines of diffusers. None makes the right half.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a mask of another size than `size = (H, W)`.
    """
    if path is None:
        mask = torch.ones(1, 1, *size)
        mask[..., size[1] // 2 :] = 0
        return mask
    image = read_images(path, (1, *size))
    return (image[:1] < 0).float()
