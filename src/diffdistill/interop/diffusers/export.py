"""A guidance-distilled student as a folder that stock pipelines of diffusers run."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.atomic import write_text
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.levels import sigma_table
from diffdistill.interop.diffusers.networks import UNet2DCondition
from diffdistill.interop.diffusers.parts import RECORD, Parts
from diffdistill.models.network import NetworkDenoiser
from diffdistill.solvers.schedules import trailing


def export_student(student: NetworkDenoiser, teacher: Parts, folder: str | os.PathLike[str]) -> Path:
    """Write a student with the other parts of its teacher's pipeline, as a folder of diffusers.

    The stock pipelines then take `guidance_scale = w + 1` and the student's number of steps, and evaluate once a step.

    Args:
        student: of stage 1 (any number of steps) or stage 2, a `UNet2DConditionModel` that takes w as its own.
        teacher: the pipeline whose autoencoder, text encoder and tokenizer the student shares, from `from_pipeline`.
        folder: where to write; it must be empty or new.

    Raises:
        ValueError: a student of another kind or convention, one for the stochastic sampler, one whose noise levels
            are not those of the stock scheduler, or a folder with other files in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new folder")
    network = student.model
    if not isinstance(network, UNet2DCondition):
        raise ValueError(f"students of the class UNet2DConditionModel are exported, not {type(network).__name__}")
    if student.w_range is None:
        raise ValueError("the student takes no guidance weight: make it with models.guidance_student, and train it")
    if network.options.time_cond_proj_dim != network.w_channels or network.embedded(torch.zeros(1)).item() != 0:
        raise ValueError('stock pipelines embed w itself: this student has another guidance_convention than "w"')
    scheduler = stock_scheduler(student, teacher.pipeline.scheduler)
    pipeline, unet = teacher.pipeline, copy.deepcopy(network.module).cpu()
    unet.register_to_config(**{RECORD: guidance_record(student)})
    parts = {**pipeline.components, "unet": unet, "scheduler": scheduler}
    flags = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    exported = type(pipeline)(**parts, **{flag: pipeline.config[flag] for flag in flags if flag in pipeline.config})
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    exported.save_pretrained(temporary, safe_serialization=True)
    write_text(temporary / "README.md", model_card(student, type(pipeline).__name__))
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)
    return folder


def stock_scheduler(student: NetworkDenoiser, teacher_scheduler: Any) -> Any:
    """The stock scheduler that samples a student exactly: DPM-Solver++ of first order on the trailing grid.

    Raises:
        ValueError: the student is for the stochastic sampler, or for other noise levels.
    """
    distilled = student.distilled
    if distilled is not None and distilled.sampler != "deterministic":
        raise ValueError(
            "stock diffusers has no stochastic N-step sampler: run this student with SolverScheduler, or distil one "
            'with sampler="deterministic"'
        )
    if distilled is not None and not on_trailing_grid(distilled.sigmas, sigma_table(teacher_scheduler)):
        raise ValueError(
            f"the student's noise levels {[round(sigma, 3) for sigma in distilled.sigmas]} are not on the trailing "
            "grid of stock schedulers: distil it with schedule=trailing, or run it with SolverScheduler"
        )
    config = teacher_scheduler.config
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    options = {name: config[name] for name in (*kept, "rescale_betas_zero_snr") if name in config}
    return diffusers().DPMSolverMultistepScheduler(
        **options,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def on_trailing_grid(sigmas: tuple[float, ...], table: Tensor) -> bool:
    """Whether noise levels, down to 0, are the trailing grid of a table, to a relative 1e-5."""
    levels = torch.tensor(sigmas, dtype=torch.float64)
    return torch.allclose(levels, trailing(num_steps=len(levels) - 1, table=table), rtol=1e-5, atol=0)


def guidance_record(student: NetworkDenoiser) -> dict[str, Any]:
    """What the field `guidance_convention` of the UNet's config says."""
    assert student.w_range is not None
    low, high = student.w_range
    record: dict[str, Any] = {
        "embeds": "w",
        "w": "guidance_scale - 1",
        "w_range": [low, high],
        "guidance_scale_range": [low + 1, high + 1],
    }
    if student.distilled is not None:
        record["distilled"] = {"sigmas": list(student.distilled.sigmas), "sampler": student.distilled.sampler}
    return record


def model_card(student: NetworkDenoiser, pipeline: str) -> str:
    """What a user of the folder must know."""
    assert student.w_range is not None
    low, high = (f"{w + 1:g}" for w in student.w_range)
    steps = student.distilled.num_steps if student.distilled else None
    count = f"{steps} step{'s' * (steps > 1)}" if steps else "any number of steps"
    example = steps or 20
    scale = f"{min(max(student.w_range[0] + 1, 7.5), student.w_range[1] + 1):g}"
    return f"""---
library_name: diffusers
---
# A guidance-distilled model of {count}

Distilled with diffdistill (Meng et al. 2023, On Distillation of Guided Diffusion Models). It runs in stock diffusers:

    from diffusers import {pipeline}
    pipeline = {pipeline}.from_pretrained(FOLDER)
    image = pipeline("a prompt", num_inference_steps={example}, guidance_scale={scale}).images[0]

- Guidance scales: {low} to {high}. The scale is an input of the network, w = guidance_scale - 1, so that a step is one
  evaluation and not two.
- Steps: {count}. Keep the scheduler of this folder.
- A negative prompt has no effect: classifier-free guidance is off, because the network contains it.
- It runs in text-to-image, image-to-image and inpainting of Stable Diffusion and SDXL, in ControlNet text-to-image and
  with T2I adapters. These run it without guidance and do not say so: pix2pix, depth2img, upscaling, image variation,
  image-to-image and inpainting with ControlNet.
- Keep it as a folder: a single-file export drops the weight `time_embedding.cond_proj`.
"""
