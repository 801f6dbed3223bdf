"""The model card of an exported student."""

from __future__ import annotations

from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers.levels import flow_shift
from diffdistill.interop.diffusers.networks import FluxTransformer
from diffdistill.models.network import NetworkDenoiser

UNET_NOTES = """\
- A negative prompt has no effect: classifier-free guidance is off, because the network contains it.
- It runs in text-to-image, image-to-image and inpainting of Stable Diffusion and SDXL, in ControlNet text-to-image and
  with T2I adapters. These run it without guidance and do not say so: pix2pix, depth2img, upscaling, image variation,
  image-to-image and inpainting with ControlNet.
- Keep it as a folder: a single-file export drops the weight `time_embedding.cond_proj`.
"""
FLOW_NOTES = """\
- A negative prompt has no effect. Leave true_cfg_scale at 1: the network contains the guidance.
- It was distilled for text-to-image.
"""
UNCONDITIONAL = """\
---
library_name: diffusers
---
# A distilled model of {count}

Distilled with diffdistill (Salimans and Ho 2022, Progressive Distillation). It runs in stock diffusers:

    from diffusers import DDPMPipeline
    pipeline = DDPMPipeline.from_pretrained(FOLDER)
    image = pipeline(num_inference_steps={steps}).images[0]

- Steps: {count}. Keep the scheduler of this folder.
"""


def model_card(student: NetworkDenoiser, pipeline: str, *, apart: bool = False) -> str:
    """What a user of the folder must know.

    Args:
        student: it takes w as an input, or no condition at all.
        pipeline: the class of the pipeline that runs it.
        apart: whether its adapters lie in a file of their own.
    """
    steps = student.distilled.num_steps if student.distilled else None
    count = f"{steps} step{'s' * (steps > 1)}" if steps else "any number of steps"
    if student.w_range is None:
        return UNCONDITIONAL.format(count=count, steps=steps or 20)
    low, high = (f"{w + 1:g}" for w in student.w_range)
    flow = isinstance(student.model, FluxTransformer)
    times = stock_times(student.distilled) if flow and student.distilled else None
    loading = "\n    pipeline.load_lora_weights(FOLDER)" if apart else ""
    scale = f"{min(max(student.w_range[0] + 1, 7.5), student.w_range[1] + 1):g}"
    length = f"num_inference_steps={steps or 20}" if times is None else f"sigmas={times}"
    levels = "" if times is None else " Pass sigmas= as above: without it the pipeline takes levels of its own."
    return f"""---
library_name: diffusers
---
# A guidance-distilled model of {count}

Distilled with diffdistill (Meng et al. 2023, On Distillation of Guided Diffusion Models). It runs in stock diffusers:

    from diffusers import {pipeline}
    pipeline = {pipeline}.from_pretrained(FOLDER){loading}
    image = pipeline("a prompt", {length}, guidance_scale={scale}).images[0]

- Guidance scales: {low} to {high}. The scale is an input of the network, w = guidance_scale - 1, so that a step is one
  evaluation and not two.
- Steps: {count}. Keep the scheduler of this folder.{levels}
{FLOW_NOTES if flow else UNET_NOTES}"""


def stock_times(distilled: Distilled) -> list[float] | None:
    """The times that a stock flow-matching pipeline must be given as `sigmas`; None where it has them by itself."""
    if flow_shift(distilled.sigmas) is not None:
        return None
    return [round(sigma / (1 + sigma), 9) for sigma in distilled.sigmas[:-1]]
