"""The settings that make sampling faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffdistill.models.acceleration import accelerated
from diffdistill.registry import choose
from diffdistill.sampling.plans import Plan


def switches(settings: dict[str, Any]) -> dict[str, bool]:
    """The settings `channels_last`, `compile` and `cuda_graph` of a script."""
    return {name: settings[name] for name in ("channels_last", "compile", "cuda_graph")}


def faster(scheme: Plan, settings: dict[str, Any]) -> Plan:
    """A plan with the switches of a script, and its `precision`."""
    bf16 = choose("precision", settings["precision"], {"fp32": False, "bf16": True})
    return replace(scheme, denoiser=accelerated(scheme.denoiser, **switches(settings)), bf16=bf16)
