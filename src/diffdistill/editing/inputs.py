"""What is edited, and with what: a model with all that belongs to it, and images of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.data import ImageData
from diffdistill.denoiser import Codec, Denoiser, image_shape
from diffdistill.files.remote import local_path
from diffdistill.models.loading import load_denoiser


@dataclass(frozen=True, eq=False)
class Editor:
    """A denoiser with the autoencoder and the text encoder that it needs.

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
    if pipeline is None and not (local_path(model) / "model_index.json").is_file():
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
