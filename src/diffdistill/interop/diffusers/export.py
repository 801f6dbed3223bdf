"""A guidance-distilled student as a folder that stock pipelines of diffusers run."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.files.atomic import new_folder
from diffdistill.interop.diffusers.adapters import adapter_state, remove
from diffdistill.interop.diffusers.base import DiffusersNetwork
from diffdistill.interop.diffusers.card import model_card
from diffdistill.interop.diffusers.conventions import GUIDANCE_CONVENTIONS
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.levels import flow_shift, sigma_table, stock
from diffdistill.interop.diffusers.networks import FluxTransformer, UNet2D, UNet2DCondition
from diffdistill.interop.diffusers.parts import RECORD, Parts
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.preconditioning import RectifiedFlow
from diffdistill.registry import choose
from diffdistill.solvers.schedules import trailing


def export_student(
    student: NetworkDenoiser,
    teacher: Parts,
    folder: str | os.PathLike[str],
    *,
    adapters: Literal["merged", "apart"] = "merged",
) -> Path:
    """Write a student with the other parts of its teacher's pipeline, as a folder of diffusers.

    The stock pipelines then take `guidance_scale = w + 1` and the student's number of steps, and evaluate once a step.
    A student of flow matching whose levels are not those of the schedule "flow" needs the argument `sigmas=` too; the
    model card says so.

    Args:
        student: of stage 1 (any number of steps) or stage 2, a `UNet2DConditionModel` or `FluxTransformer2DModel` that
            takes w as its own, or of stage 2 a `UNet2DModel` without classes, which becomes a `DDPMPipeline`.
        teacher: the pipeline whose autoencoder, text encoder and tokenizer the student shares, from `from_pipeline`.
        folder: where to write; it must be empty or new.
        adapters: of a student that has some: "merged" into its weights, or "apart", in a file for the pipeline's
            `load_lora_weights(folder)`.

    Raises:
        ValueError: a student of another kind or convention, or of another teacher than this pipeline, one for the
            stochastic sampler, one whose noise levels are not those of the stock scheduler, or a folder with other
            files in it; "apart" without adapters.
    """
    apart = choose("adapters", adapters, {"merged": False, "apart": True})
    with new_folder(folder) as made:
        _write(student, teacher, made, apart=apart)
    return Path(folder)


def _write(student: NetworkDenoiser, teacher: Parts, folder: Path, *, apart: bool) -> None:
    network, pipeline = checked(student), teacher.pipeline
    check_kinship(student, teacher.denoiser)
    if apart and network.lora is None:
        raise ValueError('this student has no adapters: export it with adapters="merged"')
    scheduler = stock_scheduler(student, pipeline.scheduler)
    module = copy.deepcopy(network.module).cpu().to(memory_format=torch.contiguous_format)  # as files hold weights
    if network.lora is not None:
        remove(module, merge=not apart)
    module.register_to_config(**{RECORD: student_record(student)})
    if isinstance(network, UNet2D):
        # DDIMPipeline would put a scheduler of its own, which clips, in place of this one.
        exported = diffusers().DDPMPipeline(unet=module, scheduler=scheduler)
    else:
        parts = {**pipeline.components, EXPORTED[type(network)]: module, "scheduler": scheduler}
        flags = ("force_zeros_for_empty_prompt", "requires_safety_checker")
        exported = type(pipeline)(**parts, **{flag: pipeline.config[flag] for flag in flags if flag in pipeline.config})
    exported.save_pretrained(folder, safe_serialization=True)
    if apart:
        assert network.lora is not None
        layers = {f"{EXPORTED[type(network)]}_lora_layers": adapter_state(network.module, network.lora)}
        exported.save_lora_weights(folder, **layers)
    card = model_card(student, type(exported).__name__, apart=apart)
    (folder / "README.md").write_text(card, encoding="utf-8")


EXPORTED: dict[type, str] = {UNet2DCondition: "unet", FluxTransformer: "transformer"}
"""The networks that stock pipelines give a guidance scale, and what the pipelines call them."""


def checked(student: NetworkDenoiser) -> DiffusersNetwork:
    """The network of a student that stock pipelines can run.

    Raises:
        ValueError: it is of another kind, takes no w, or takes it in another convention.
    """
    network = student.model
    if isinstance(network, UNet2D) and not network.label_dim:
        if student.w_range is not None or student.flow_map:
            raise ValueError("stock pipelines give a UNet2DModel neither a guidance weight nor the end of a step")
        return network
    if not isinstance(network, (UNet2DCondition, FluxTransformer)):
        kind = getattr(network, "kind", type(network).__name__)
        raise ValueError(
            f"stock pipelines give no guidance weight to a {kind}: students of the classes UNet2DConditionModel and "
            "FluxTransformer2DModel are exported, and of UNet2DModel those without classes"
        )
    if student.flow_map:
        raise ValueError(
            "stock pipelines do not tell a network where a step ends, which a flow map needs: export a student of a "
            "fixed number of steps, by the method halving, trajectory or consistency"
        )
    if student.w_range is None:
        raise ValueError("the student takes no guidance weight: make it with models.guidance_student, and train it")
    stock = "scale" if isinstance(network, FluxTransformer) else "w"
    width = 256 if stock == "scale" else network.options.time_cond_proj_dim
    if width != network.w_channels or network.embedded is not GUIDANCE_CONVENTIONS[stock]:
        raise ValueError(f'this student has another guidance_convention than "{stock}", which stock pipelines have')
    return network


SHARED = (
    *("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"),
    *("projection_class_embeddings_input_dim", "joint_attention_dim", "pooled_projection_dim"),
)
"""Options of a network that the other parts of its pipeline fix."""


def check_kinship(student: NetworkDenoiser, teacher: NetworkDenoiser) -> None:
    """Raise `ValueError` unless the student takes and predicts what the network of the teacher's pipeline does."""
    mine, theirs = _traits(student), _traits(teacher)
    for name, value in mine.items():
        other = theirs[name]
        alike = math.isclose(value, other, rel_tol=1e-4) if isinstance(value, float) else value == other
        if not alike:
            raise ValueError(
                f"the student is not of this pipeline: its {name} is {value}, that of the pipeline {other}; give the "
                "pipeline of the model that it was distilled from"
            )


def _traits(denoiser: NetworkDenoiser) -> dict[str, Any]:
    config: Any = denoiser.config
    options = {name: config["network"]["options"].get(name) for name in SHARED}
    ends = {name: float(config[name]) for name in ("sigma_min", "sigma_max")}
    return {"network": config["network"]["kind"], **options, "prediction": config["preconditioning"]["name"], **ends}


def stock_scheduler(student: NetworkDenoiser, teacher_scheduler: Any) -> Any:
    """The stock scheduler that samples a student exactly: DPM-Solver++ of first order on the trailing grid.

    Flow matching has a first-order scheduler already, which takes any number of steps; a few-step student fixes its
    shift.

    Raises:
        ValueError: the student is for the stochastic sampler, or for other noise levels.
    """
    distilled, teacher_scheduler = student.distilled, stock(teacher_scheduler)
    flow = isinstance(student.preconditioning, RectifiedFlow)
    if distilled is not None and distilled.sampler != "deterministic":
        own = "run this student with student_scheduler, or " if distilled.sampler == "stochastic" else ""
        raise ValueError(
            f'stock diffusers has no {distilled.sampler} sampler: {own}distil one with sampler="deterministic"'
        )
    if flow:
        if distilled is None:
            return teacher_scheduler
        return diffusers().FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=teacher_scheduler.config.num_train_timesteps, shift=flow_shift(distilled.sigmas) or 1.0
        )
    if distilled is not None and not on_trailing_grid(distilled.sigmas, sigma_table(teacher_scheduler)):
        raise ValueError(
            f"the student's noise levels {[round(sigma, 3) for sigma in distilled.sigmas]} are not on the trailing "
            "grid of stock schedulers: distil it with schedule=trailing, or run it with student_scheduler"
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


def student_record(student: NetworkDenoiser) -> dict[str, Any]:
    """What the field `guidance_convention` of the UNet's config says."""
    record: dict[str, Any] = {}
    if student.w_range is not None:
        low, high = student.w_range
        record = {
            "embeds": next(name for name, of in GUIDANCE_CONVENTIONS.items() if of is student.model.embedded),
            "w": "guidance_scale - 1",
            "w_range": [low, high],
            "guidance_scale_range": [low + 1, high + 1],
        }
    if student.distilled is not None:
        record["distilled"] = {"sigmas": list(student.distilled.sigmas), "sampler": student.distilled.sampler}
    return record
