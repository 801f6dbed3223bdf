"""Latent diffusion (Rombach et al. 2022): the unconditional and class-conditional U-Nets in its `.ckpt` files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord
from diffdistill.interop.formats.building import ForeignModel, build_strictly, finite_float, sizes_of
from diffdistill.interop.formats.stable import read_stable_diffusion
from diffdistill.interop.formats.unets import Architecture, Hints, infer

UNET = "model.diffusion_model."
CLASS_TABLE = "cond_stage_model.embedding.weight"


def holds_latent_diffusion(checkpoint: ForeignCheckpoint) -> bool:
    """Whether a checkpoint is one of latent diffusion or Stable Diffusion."""
    return any(str(name).startswith(UNET) for name in checkpoint.state)


def read_ldm(checkpoint: ForeignCheckpoint, hints: Hints | None = None) -> ForeignModel:
    """Read the U-Net of a latent diffusion model; the weights' moving average where the file has one.

    One that is conditioned on text is Stable Diffusion, of which the other parts are read too. For the others, latents
    are as the U-Net takes them: `settings["scale_factor"]` times those of the first stage, which is left out.

    Raises:
        ForeignFileError: it is damaged, or of a kind that is not read.
        ImportError: it is conditioned on text, and the extra is missing.
    """
    state = checkpoint.state
    if not all(isinstance(name, str) for name in state):
        raise ForeignFileError("damaged state dict")
    records = {name.removeprefix(UNET): record for name, record in state.items() if name.startswith(UNET)}
    architecture = infer(records)
    if architecture.context_dim and CLASS_TABLE not in state:
        betas = _betas(checkpoint, state).tolist() if "betas" in state else None
        return read_stable_diffusion(checkpoint, _averaged(records, state)[0], architecture, betas, hints)
    if architecture.img_channels != architecture.out_channels:
        raise ForeignFileError(
            f"the U-Net maps {architecture.img_channels} channels to {architecture.out_channels}: models without text "
            "that take an image as a condition are not read"
        )
    records, averaged = _averaged(records, state)
    num_classes = architecture.label_dim
    if architecture.context_dim:
        records["context_emb.weight"] = table = state[CLASS_TABLE]
        if not isinstance(table, TensorRecord) or len(table.size) != 2:
            raise ForeignFileError("damaged table of classes")
        if table.size[0] == 1000:
            raise ForeignFileError("ImageNet models whose table of classes has no row for no class are not read")
        num_classes = table.size[0] - 1
    hints = hints.over(_published(architecture)) if hints else _published(architecture)
    levels = _noise_levels(_betas(checkpoint, state))
    config = {
        "network": {"name": "openai_unet", **architecture.options(hints)},
        "preconditioning": {"name": "eps", "table": levels},
        "data_shape": [architecture.img_channels, hints.image_size, hints.image_size],
        "num_classes": num_classes,
        "latents": True,
        "sigma_min": levels[0],
        "sigma_max": levels[-1],
        "provenance": {"format": "ldm", "averaged": averaged, "scale_factor": _scale(checkpoint, state)},
    }
    denoiser = build_strictly(config, {f"model.{name}": record for name, record in records.items()}, checkpoint)
    text = (
        f"latent diffusion, U-Net on latents of {sizes_of(config)}, {'averaged' if averaged else 'last'} weights, "
        f"sigma {levels[0]:.3g} to {levels[-1]:.3g}"
    )
    return ForeignModel("ldm", denoiser, text, settings={"scale_factor": config["provenance"]["scale_factor"]})


def _published(architecture: Architecture) -> Hints:
    """What the released models of this shape have, and their parameters do not say."""
    if architecture.context_dim:  # ImageNet 256x256
        return Hints(image_size=64, num_heads=1)
    if architecture.img_channels == 4:  # LSUN churches
        return Hints(image_size=32, num_heads=8)
    return Hints(image_size=64, head_channels=32)  # LSUN bedrooms, FFHQ, CelebA


def _averaged(records: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The moving average of the U-Net's weights, whose names have lost their dots, or the weights themselves."""
    names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in records}
    if not all(average in state for average in names.values()):
        return dict(records), False
    return {name: state[average] for name, average in names.items()}, True


def _betas(checkpoint: ForeignCheckpoint, state: Mapping[str, Any]) -> torch.Tensor:
    """The betas that the file carries, float64."""
    record = state.get("betas")
    if not isinstance(record, TensorRecord) or len(record.size) != 1 or not 2 <= record.numel <= 10_000:
        raise ForeignFileError("the file misses its betas, which define the noise levels")
    betas = checkpoint.tensors({"betas": record})["betas"].double()
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ForeignFileError("the betas of the file do not lie between 0 and 1")
    return betas


def _noise_levels(betas: torch.Tensor) -> list[float]:
    """The table of sigmas."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    if not bool(torch.isfinite(sigmas).all()):
        raise ForeignFileError("the betas of the file lead to infinite noise")
    return sigmas.tolist()


def _scale(checkpoint: ForeignCheckpoint, state: Mapping[str, Any]) -> float:
    record = state.get("scale_factor")
    if not isinstance(record, TensorRecord) or record.numel != 1:
        return 1.0
    return finite_float(
        float(checkpoint.tensors({"scale_factor": record})["scale_factor"]), "scale_factor", positive=True
    )
