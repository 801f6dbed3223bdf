"""What is edited, and with what: a model with all that belongs to it, pictures and masks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.data import ImageData
from diffdistill.data.folders import IMAGE_SUFFIXES
from diffdistill.denoiser import Codec, Denoiser, image_shape
from diffdistill.models.loading import load_denoiser


@dataclass(frozen=True, eq=False)
class Editor:
    """A denoiser with what turns images and words into what it takes.

    Attributes:
        denoiser: the model.
        codec: its autoencoder, or None where it denoises images.
        prompts: maps texts to its condition, or None where it takes no text.
    """

    denoiser: Denoiser
    codec: Codec | None
    prompts: Callable[[Sequence[str]], Any] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, H, W)` of the images that it edits."""
        return image_shape(self.denoiser.data_shape, self.codec)


def load_editor(model: str, *, pipeline: str | None = None, device: torch.device | str = "cpu") -> Editor:
    """Load a model, and where it comes from diffusers the autoencoder and the text encoders beside it.

    Args:
        model: as `load_denoiser` takes it.
        pipeline: the diffusers folder that a latent model without its autoencoder belongs to.
        device: where to put everything.

    Raises:
        ValueError: as `load_denoiser`, or `pipeline` is no such folder.
    """
    if pipeline is None and not (Path(model) / "model_index.json").is_file():
        denoiser = load_denoiser(model, device=device)
        return Editor(denoiser, denoiser.codec, None)
    from diffdistill.interop.diffusers import load_pipeline

    parts = load_pipeline(pipeline or model)
    parts.pipeline.to(device)
    own = pipeline in (None, model)
    return Editor(
        parts.denoiser.to(device) if own else load_denoiser(model, device=device),
        parts.codec,
        parts.prompts,
    )


def first_images(data: ImageData, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first `count` images of a data set, `[count, C, H, W]`, and their labels.

    Raises:
        ValueError: images of another shape than `shape = (C, H, W)`, or fewer of them.
    """
    if tuple(data.shape) != tuple(shape):
        raise ValueError(f"the model takes images {list(shape)}, but the data has {list(data.shape)}: choose data=")
    if not 1 <= count <= len(data):
        raise ValueError(f"num_images={count}: the data has {len(data)} images")
    items = [data[i] for i in range(count)]
    return torch.stack([item["x"] for item in items]), torch.stack([item["y"] for item in items])


def read_images(path: str | os.PathLike[str], shape: tuple[int, ...]) -> Tensor:
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


def read_mask(path: str | os.PathLike[str] | None, size: tuple[int, ...]) -> Tensor:
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
