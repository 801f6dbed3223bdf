"""Encode images to latents once, for the training of latent models.

    diffdistill cache-latents model=runs/shapes/autoencoder data=shapes out=data/shapes-latents
    diffdistill cache-latents model=models/stable-diffusion images=data/laion512 out=data/laion512-latents

The first encodes a data set with labels, and keeps the autoencoder beside the latents; the second encodes images and
their captions. Running the same command again continues an interrupted run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.checks import refuse_unread
from common.command import command
from common.configs import plain
from diffdistill.data import load_data
from diffdistill.data.latents import cache_images
from diffdistill.devices import device_of
from diffdistill.files.contents import content_of
from diffdistill.models import load_autoencoder, save_autoencoder
from diffdistill.training.inputs import identity, inputs_of


def cache(settings: dict[str, Any]) -> Path:
    """Write the latents, and return their folder."""
    device = device_of(settings["device"])
    options = {name: settings[name] for name in ("batch_size", "shard_size", "dtype")}
    data = settings.get("data")
    if (data is None) == (settings["images"] is None):
        raise ValueError(
            "give a data set with labels (data=shapes) or a folder of images with captions (images=FOLDER)"
        )
    if data is None:
        from diffdistill.interop.diffusers import load_pipeline
        from diffdistill.interop.diffusers.caching import cache_latents

        parts = load_pipeline(settings["model"])
        parts.pipeline.to(device)
        return cache_latents(parts, settings["images"], settings["out"], seed=settings["seed"], **options)
    refuse_unread("cache_latents", settings, ["seed"], "on a data set: it is for images=FOLDER")
    images, (codec, shape, save) = load_data(**data), codec_of(settings["model"], device)
    named = {name: settings[name] for name in ("model", "data", "dtype", "shard_size")}
    origin = identity(named, {name: content_of(files) for name, files in inputs_of(named).items()})
    if tuple(images.shape) != shape:
        raise ValueError(f"the data has images {list(images.shape)}, but the autoencoder takes {list(shape)}")
    return cache_images(codec, images, settings["out"], save_codec=save, origin=origin, device=device, **options)


def codec_of(model: str, device: Any) -> tuple[Any, tuple[int, ...], Any]:
    """The autoencoder of a model, the shape of its images, and how to save it (that of a diffusers folder is not)."""
    if not (Path(model) / "model_index.json").is_file():
        autoencoder = load_autoencoder(model)
        return autoencoder.to(device), autoencoder.data_shape, partial(save_autoencoder, autoencoder)
    from diffdistill.interop.diffusers import load_pipeline

    parts = load_pipeline(model)
    if parts.codec is None:
        raise ValueError(f"{type(parts.pipeline).__name__} has no autoencoder to make latents with")
    parts.pipeline.to(device)
    side = parts.denoiser.data_shape[-1] * parts.codec.factor
    return parts.codec, (3, side, side), None


@command("cache_latents")
def main(config: DictConfig) -> None:
    print(f"the latents are {cache(plain(config))}")


if __name__ == "__main__":
    main()
