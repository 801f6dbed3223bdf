"""The noise levels to train at, which by default are those that a model was made for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from diffdistill.denoiser import Denoiser
from diffdistill.sampling.plans import schedule_for
from diffdistill.training.noise_levels import NoiseLevels, make_noise_levels

TOLERANCE = 1e-3
"""Relative; ends that were rounded are no others."""


def noise_levels_for(denoiser: Denoiser, options: Mapping[str, Any] | None) -> NoiseLevels:
    """A distribution of noise levels for a denoiser.

    Args:
        denoiser: its `sigma_min` and `sigma_max` are the ends of the distribution where `options` do not say others.
        options: of `make_noise_levels`; by default "cosine". "on_schedule" takes `schedule`, options of
            `make_schedule`, whose levels it draws from.

    Raises:
        ValueError, TypeError: as `make_noise_levels`.

    Warns where levels lie outside the range of the denoiser.
    """
    options = dict(options or {"name": "cosine"})
    name, ends = options.get("name"), (denoiser.sigma_min, denoiser.sigma_max)
    if name == "on_schedule" and "schedule" in options:
        sigmas = schedule_for(denoiser, options.pop("schedule"))
        options["sigmas"] = sigmas
        _warn_outside(float(sigmas[sigmas > 0].min()), float(sigmas.max()), ends)
    elif name == "cosine":
        for end, value in zip(("sigma_min", "sigma_max"), ends, strict=True):
            if options.get(end) is None:
                options[end] = value
        _warn_outside(options["sigma_min"], options["sigma_max"], ends)
    return make_noise_levels(**options)


def teacher_levels(denoiser: Denoiser) -> dict[str, Any]:
    """The distribution that a teacher is trained with by default, as options of `noise_levels_for`.

    Uniform on the table of a model of discrete time (Ho et al. 2020), log-normal for EDM's, else cosine.
    """
    preconditioning = getattr(denoiser, "preconditioning", None)
    table = getattr(preconditioning, "table", None)
    if table is not None:
        return {"name": "on_schedule", "sigmas": table.tolist()}
    return {"name": "lognormal"} if type(preconditioning).__name__ in ("EDM", "Denoised") else {"name": "cosine"}


def _warn_outside(low: float, high: float, ends: tuple[float, float]) -> None:
    if low < ends[0] * (1 - TOLERANCE) or high > ends[1] * (1 + TOLERANCE) or not math.isfinite(high):
        warnings.warn(
            f"noise levels from {low:g} to {high:g} lie outside those of the model, {ends[0]:g} to {ends[1]:g}, which "
            "it was not trained on",
            stacklevel=3,
        )
