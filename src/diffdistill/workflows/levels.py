"""The noise levels to train at, which by default are those that a model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffdistill.denoiser import Denoiser
from diffdistill.sampling.plans import schedule_for
from diffdistill.training.noise_levels import NoiseLevels, noise_levels_of


def noise_levels_for(denoiser: Denoiser, options: Mapping[str, Any] | None) -> NoiseLevels:
    """As `noise_levels_of`; "on_schedule" also takes `schedule`, options of a schedule whose levels it draws from."""
    options = dict(options or {"name": "cosine"})
    if "schedule" in options:
        options["sigmas"] = schedule_for(denoiser, options.pop("schedule"))
    return noise_levels_of(denoiser, options)


def teacher_levels(denoiser: Denoiser) -> dict[str, Any]:
    """The distribution that a teacher is trained with by default, as options of `noise_levels_for`.

    Uniform on the table of a model of discrete time (Ho et al. 2020), log-normal for EDM's, else cosine.
    """
    preconditioning = getattr(denoiser, "preconditioning", None)
    table = getattr(preconditioning, "table", None)
    if table is not None:
        return {"name": "on_schedule", "sigmas": table.tolist()}
    return {"name": "lognormal"} if type(preconditioning).__name__ in ("EDM", "Denoised") else {"name": "cosine"}
