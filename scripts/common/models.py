"""Models that scripts load: with the adapters of a file, where one is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffdistill import load_denoiser
from diffdistill.denoiser import Denoiser
from diffdistill.interop.lora import add_lora


def load_model(
    settings: Mapping[str, Any], name: str = "model", *, device: torch.device | str = "cpu", trains: bool = False
) -> Denoiser:
    """The model of a setting, with the adapters of `lora`, where that is a file, times `lora_strength`."""
    return adapted(load_denoiser(settings[name], device=device), settings, trains=trains)


def adapted(denoiser: Denoiser, settings: Mapping[str, Any], *, trains: bool = False) -> Denoiser:
    """A model with the adapters of `lora`, where that is a file.

    Args:
        denoiser: the model; it is changed.
        settings: of a script.
        trains: whether `lora` may be a mapping, of adapters to train.

    Raises:
        ValueError: a strength without a file, or adapters to train where nothing is trained.
    """
    lora, strength = settings["lora"], settings["lora_strength"]
    if isinstance(lora, dict) and not trains:
        raise ValueError(f"lora={lora}: this command trains no adapters, give the file of some")
    if isinstance(lora, str):
        return add_lora(denoiser, lora, strength=1.0 if strength is None else strength)
    if strength is not None:
        raise ValueError(f"lora_strength={strength} has no effect without lora=FILE")
    return denoiser


def trained_adapters(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of adapters to train, where `lora` is a mapping of these and no file."""
    return settings["lora"] if isinstance(settings["lora"], dict) else None
