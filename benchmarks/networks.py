"""The networks that are measured, with random weights: those of configs/network, and two of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffdistill.denoiser import spread_labels
from diffdistill.models import build_denoiser
from diffdistill.models.network import NetworkDenoiser

CONFIGS = Path(__file__).parents[1] / "configs" / "network"
SHAPES = {"digits": ((1, 8, 8), 10), "ddpmpp_cifar10": ((3, 32, 32), 10), "adm_imagenet64": ((3, 64, 64), 1000)}
"""Shape and classes of the images of a network in configs/network."""

TINY = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
DIFFUSERS: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32, as DDIMPipeline runs it
    "unet2d_cifar10": {
        "kind": "UNet2DModel",
        "options": {
            "sample_size": 32,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
        },
    },
    # Stable Diffusion 1.5: the defaults of the class are its own
    "sd15_unet": {
        "kind": "UNet2DConditionModel",
        "options": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "null": {"encoder_hidden_states": [77, 768]},
    },
    # to try the two above
    "unet2d_tiny": {
        "kind": "UNet2DModel",
        "options": {
            **TINY,
            "sample_size": 8,
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
        },
    },
    "sd_tiny": {
        "kind": "UNet2DConditionModel",
        "options": {
            **TINY,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "null": {"encoder_hidden_states": [7, 16]},
    },
}
NAMES = (*SHAPES, *DIFFUSERS)


def network(name: str, resolution: int | None = None) -> NetworkDenoiser:
    """A denoiser by name; `resolution` replaces that of its images or latents."""
    if name in DIFFUSERS:
        import diffdistill.interop.diffusers  # noqa: F401 (which adds its networks)

        parts = DIFFUSERS[name]
        options = dict(parts["options"])
        size = options["sample_size"] = resolution or options["sample_size"]
        channels = 3 if parts["kind"] == "UNet2DModel" else 4
        config = {"network": {"name": "diffusers", **parts, "options": options}, "preconditioning": {"name": "eps"}}
        return build_denoiser({**config, "data_shape": (channels, size, size), "sigma_min": 0.03, "sigma_max": 14.0})
    shape, classes = SHAPES[name]
    shape = shape if resolution is None else (shape[0], resolution, resolution)
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return build_denoiser({**config, "data_shape": shape, "num_classes": classes})


def condition(denoiser: NetworkDenoiser, batch: int, device: torch.device | str = "cpu") -> Any:
    """Labels or text embeddings for a batch, or None."""
    parts = (denoiser.config or {})["network"].get("null")
    if parts:
        return {name: torch.randn(batch, *shape, device=device) for name, shape in parts.items()}
    labels = spread_labels(batch, denoiser.num_classes)
    return None if labels is None else labels.to(device)


def bare(denoiser: NetworkDenoiser, batch: int, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """One evaluation of the network alone, on inputs that lie ready."""
    x, noise_labels = torch.randn(batch, *denoiser.data_shape, device=device), torch.ones(batch, device=device)
    given = condition(denoiser, batch, device)
    if denoiser.num_classes:
        given = torch.zeros(batch, denoiser.num_classes, device=device)
    w = None if denoiser.w_range is None else torch.ones(batch, device=device)
    return lambda: denoiser.model(x, noise_labels, given, w)


class Noise:
    """As many random images and conditions as a batch needs, in memory."""

    def __init__(self, denoiser: NetworkDenoiser, size: int) -> None:
        given = condition(denoiser, size)
        parts = {f"y.{name}": value for name, value in given.items()} if isinstance(given, dict) else {"y": given}
        self.items = {"x": torch.randn(size, *denoiser.data_shape).clamp(-1, 1)}
        self.items |= {name: value for name, value in parts.items() if value is not None}

    def __len__(self) -> int:
        return len(self.items["x"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.items.items()}

    def tensors(self) -> dict[str, Tensor]:
        return self.items
