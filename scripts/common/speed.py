"""The settings that make sampling faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffdistill.models.acceleration import accelerated
from diffdistill.sampling.plans import Plan, in_bf16


def switches(settings: dict[str, Any]) -> dict[str, bool]:
    """The settings `channels_last`, `compile` and `cuda_graph` of a script."""
    return {name: settings[name] for name in ("channels_last", "compile", "cuda_graph")}


def faster(plan: Plan, settings: dict[str, Any]) -> Plan:
    """A plan with the switches of a script, and its `precision`."""
    bf16 = in_bf16(settings["precision"], plan.device)
    return replace(plan, denoiser=accelerated(plan.denoiser, **switches(settings)), bf16=bf16)
