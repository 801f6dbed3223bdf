"""The autoencoder of latent models: images to latents and back (Rombach et al. 2022, Section 3.1), in small."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.errors import one_line
from diffdistill.files.remote import local_path
from diffdistill.models.layers import Conv2d, GroupNorm, Init
from diffdistill.models.storage import DAMAGES, MODEL, load_state, shipped_models, write_model


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity, which it is at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = GroupNorm(channels), GroupNorm(channels)
        self.conv0, self.conv1 = Conv2d(channels, channels, 3), Conv2d(channels, channels, 3, Init(weight=0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.silu(self.norm1(self.conv0(F.silu(self.norm0(x))))))


class Autoencoder(nn.Module):
    """A convolutional autoencoder whose latents have, over the data it was fitted to, zero mean and unit variance.

    Images are first folded into blocks of 2x2 pixels; every further level halves the side.

    Args:
        data_shape: of the images, `(C, H, W)`.
        latent_channels: channels of the latents.
        channels: of each level after the folding.
        num_blocks: residual blocks per level, in the encoder and in the decoder.

    Attributes:
        channels: of the images.
        factor: pixels per latent along a side.
        latent_shape: `(latent_channels, H / factor, W / factor)`.
        config: what builds it again, with its provenance.

    Raises:
        ValueError: the sides of the images are no multiples of `factor`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        data_shape: Sequence[int],
        latent_channels: int = 4,
        channels: Sequence[int] = (32, 64),
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        images, height, width = data_shape
        self.factor = 2 ** len(channels)
        if height % self.factor or width % self.factor:
            raise ValueError(f"the sides of the images must be multiples of {self.factor}, but they are {data_shape}")
        self.channels, self.data_shape = images, (images, height, width)
        self.latent_shape = (latent_channels, height // self.factor, width // self.factor)
        self.config: dict[str, Any] = {
            "data_shape": list(data_shape),
            "latent_channels": latent_channels,
            "channels": list(channels),
            "num_blocks": num_blocks,
        }
        down: list[nn.Module] = [nn.PixelUnshuffle(2), Conv2d(4 * images, channels[0], 3)]
        up: list[nn.Module] = [Conv2d(latent_channels, channels[-1], 3)]
        for i, width in enumerate(channels):
            if i:
                down.append(Conv2d(channels[i - 1], width, 3, resample="down"))
            down += [ResidualBlock(width) for _ in range(num_blocks)]
        for i, width in reversed(list(enumerate(channels))):
            up += [ResidualBlock(width) for _ in range(num_blocks)]
            if i:
                up.append(Conv2d(width, channels[i - 1], 3, resample="up"))
        down += [GroupNorm(channels[-1]), nn.SiLU(), Conv2d(channels[-1], latent_channels, 3)]
        up += [GroupNorm(channels[0]), nn.SiLU(), Conv2d(channels[0], 4 * images, 3), nn.PixelShuffle(2)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.register_buffer("shift", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(latent_channels, 1, 1))

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] to latents `[B, *latent_shape]`; nothing is drawn from a generator."""
        return (self.encoder(images) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, *latent_shape]` to images `[B, C, H, W]`, about in [-1, 1]; differentiable in the latents."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            return self.decoder(latents / self.scale + self.shift)

    @torch.no_grad()
    def fit_scale(self, images: Tensor, *, batch_size: int = 250) -> None:
        """Shift and scale each channel so that the latents of `images` have mean 0 and standard deviation 1."""
        raw = torch.cat([self.encoder(part).float() for part in images.split(batch_size)])
        self.shift.copy_(raw.mean((0, 2, 3)).view_as(self.shift))
        self.scale.copy_(1 / raw.std((0, 2, 3)).view_as(self.scale))


def build_autoencoder(config: Mapping[str, Any]) -> Autoencoder:
    """An autoencoder with fresh weights from its options, and a `provenance` that it keeps.

    Raises:
        TypeError: an option that it does not have.
        ValueError: an option out of range.
    """
    options = {name: value for name, value in config.items() if name != "provenance"}
    autoencoder = Autoencoder(**options)
    autoencoder.config["provenance"] = config.get("provenance")
    return autoencoder


def freeze(module: nn.Module) -> nn.Module:
    """Turn parameters into buffers: they stay part of the state, but are never trained, averaged or split."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach())
    return module.eval()


def save_autoencoder(
    autoencoder: Autoencoder, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write weights and config to one safetensors file; arguments as those of `save_denoiser`."""
    if provenance is not None:
        autoencoder.config["provenance"] = dict(provenance)
    write_model(path, autoencoder, {"autoencoder": autoencoder.config})


def load_autoencoder(name_or_path: str | os.PathLike[str]) -> Autoencoder:
    """Load an autoencoder from its file, from the folder of its run, or from a latent model, by name or path.

    Raises:
        ValueError: there is no such file, or no autoencoder in it.
    """
    path = shipped_models().get(os.fspath(name_or_path)) or local_path(name_or_path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no autoencoder at {str(path)!r}: give a file, the folder of a run, or a latent model")
    config, state = MODEL.read(file)
    if config.get("autoencoder") is None:
        raise ValueError(f"{file} holds no autoencoder")
    try:
        autoencoder = build_autoencoder(config["autoencoder"])
    except DAMAGES as error:
        raise ValueError(f"the config in {file} builds no autoencoder: {one_line(error)}") from None
    if "network" in config:
        prefix = "autoencoder."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_state(autoencoder, state, source=str(file))
    return autoencoder.eval()
