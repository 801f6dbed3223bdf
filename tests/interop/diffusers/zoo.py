"""Stock pipelines with tiny components, which they share: how each is made and called for a tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from tests.interop.diffusers import builders
from tests.interop.diffusers.builders import component, diffusers

IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8))
MASK = (torch.arange(16) > 6).float().expand(1, 1, 16, 16)


@cache
def shared(name, **options):
    """A component, made once."""
    return getattr(builders, name)(**options)


@cache
def controlnet():
    made = component(
        "ControlNetModel",
        3,
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    )
    return builders.filled(made)


def simple_unet(channels, cross=12, **changes):
    """The network of Kandinsky 2.2 and DeepFloyd, which predicts a variance too."""
    return component(
        "UNet2DConditionModel",
        4,
        sample_size=8,
        in_channels=channels,
        out_channels=2 * channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=cross,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **changes,
    )


@cache
def kandinsky():
    unet = simple_unet(4, encoder_hid_dim=10, encoder_hid_dim_type="image_proj", addition_embed_type="image")
    movq = component(
        "VQModel",
        5,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return {"unet": unet, "movq": movq}


@cache
def deepfloyd():
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    unet = simple_unet(3, encoder_hid_dim=10, encoder_hid_dim_type="text_proj")
    return {"unet": unet, **absent, "requires_safety_checker": False}


@cache
def pixart():
    made = component(
        "PixArtTransformer2DModel",
        6,
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=10,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    return {"transformer": made, "vae": shared("vae"), "tokenizer": None, "text_encoder": None}


@cache
def stable(in_channels=4):
    return {
        "vae": shared("vae"),
        "text_encoder": shared("text_encoder"),
        "tokenizer": shared("tokenizer"),
        "unet": shared("unet", in_channels=in_channels),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _parts(pipe):
    return {name: part for name, part in pipe.components.items() if name != "scheduler"}


@cache
def stable_xl():
    return {**_parts(builders.sdxl_pipeline()), "add_watermarker": False}


@cache
def sd3():
    network = builders.sd3(in_channels=16, out_channels=16)
    return {**_parts(builders.sd3_pipeline()), "transformer": network, "vae": builders.vae(16, shift_factor=0.1)}


@cache
def flux():
    return {**_parts(builders.flux_pipeline()), "vae": builders.vae(shift_factor=0.1)}


DDIM = ("DDIMScheduler", {**builders.SD_BETAS, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False})
EULER = ("EulerDiscreteScheduler", {**builders.SD_BETAS, "timestep_spacing": "leading", "steps_offset": 1})
PNDM = ("PNDMScheduler", {**builders.SD_BETAS, "skip_prk_steps": True, "steps_offset": 1})
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
SHIFTED = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
CLIPPED = ("DDPMScheduler", {})
KANDINSKY = ("DDPMScheduler", {**builders.SD_BETAS, "clip_sample": False})
THRESHOLDED = (
    "DDPMScheduler",
    {
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
        "variance_type": "learned_range",
    },
)
PROMPT = {"prompt": "a cat", "guidance_scale": 3.0}
LATENT = {"output_type": "latent"}
CONTROL = {"control_image": IMAGE}
EMBEDS = {
    "image_embeds": torch.randn(1, 10, generator=torch.Generator().manual_seed(1)),
    "negative_image_embeds": torch.zeros(1, 10),
}
TEXT = {
    "prompt_embeds": torch.randn(1, 7, 10, generator=torch.Generator().manual_seed(1)),
    "negative_prompt_embeds": torch.zeros(1, 7, 10),
}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 7, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(1, 7, dtype=torch.long),
}


@dataclass(frozen=True)
class Case:
    """A stock pipeline.

    Attributes:
        parts: makes its components but for the scheduler.
        source: its own scheduler: class and settings.
        options: of its call.
        starts: whether it begins at a strength.
        whole: what it counts as a step where it begins at a strength: False where that is a timestep.
        custom: the arguments by which it takes levels.
    """

    parts: Callable
    source: tuple
    options: dict = field(default_factory=dict)
    starts: bool = False
    whole: bool = True
    custom: tuple = ()

    def scheduler(self):
        return getattr(diffusers, self.source[0])(**self.source[1])

    def pipe(self, name, scheduler=None):
        made = getattr(diffusers, name)(**self.parts(), scheduler=scheduler or self.scheduler())
        made.set_progress_bar_config(disable=True)
        return made

    def run(self, pipe, seed=0, **changes):
        """What the pipeline makes, and how often it asked its network."""
        network = getattr(pipe, "unet", None) or pipe.transformer
        asked = []
        hook = network.register_forward_hook(lambda *_: asked.append(1))
        options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed), **self.options}
        torch.manual_seed(seed)
        try:
            images = pipe(**{**options, **changes}).images
        finally:
            hook.remove()
        return torch.as_tensor(images), len(asked)


BOTH = ("timesteps", "sigmas")
PIPELINES = {
    "StableDiffusionPipeline": Case(stable, DDIM, {**PROMPT, **LATENT}, custom=BOTH),
    "StableDiffusionImg2ImgPipeline": Case(stable, PNDM, {**PROMPT, **LATENT, "image": IMAGE}, True, custom=BOTH),
    "StableDiffusionInpaintPipeline": Case(
        stable, EULER, {**PROMPT, **LATENT, "image": IMAGE, "mask_image": MASK, "height": 16, "width": 16}, True
    ),
    "StableDiffusionControlNetPipeline": Case(
        lambda: {**stable(), "controlnet": controlnet()}, EULER, {**PROMPT, **LATENT, "image": IMAGE}, custom=BOTH
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Case(
        lambda: {**stable(), "controlnet": controlnet()}, DDIM, {**PROMPT, **LATENT, **CONTROL, "image": IMAGE}, True
    ),
    "StableDiffusionControlNetInpaintPipeline": Case(
        lambda: {**stable(), "controlnet": controlnet()},
        DDIM,
        {**PROMPT, **LATENT, **CONTROL, "image": IMAGE, "mask_image": MASK},
        True,
    ),
    "StableDiffusionPAGPipeline": Case(stable, EULER, {**PROMPT, **LATENT, "pag_scale": 2.0}, custom=BOTH),
    "StableDiffusionInstructPix2PixPipeline": Case(
        lambda: stable(in_channels=8), EULER, {**PROMPT, **LATENT, "image": IMAGE}
    ),
    "StableDiffusionXLPipeline": Case(stable_xl, EULER, {**PROMPT, **LATENT}, custom=BOTH),
    "StableDiffusionXLImg2ImgPipeline": Case(stable_xl, EULER, {**PROMPT, **LATENT, "image": IMAGE}, True, custom=BOTH),
    "StableDiffusionXLInpaintPipeline": Case(
        stable_xl, EULER, {**PROMPT, **LATENT, "image": IMAGE, "mask_image": MASK, "height": 16, "width": 16}, True
    ),
    "StableDiffusion3Pipeline": Case(sd3, FLOW, {**PROMPT, **LATENT}, custom=("sigmas",)),
    "StableDiffusion3Img2ImgPipeline": Case(sd3, FLOW, {**PROMPT, **LATENT, "image": IMAGE}, True, custom=("sigmas",)),
    "StableDiffusion3InpaintPipeline": Case(
        sd3,
        FLOW,
        {**PROMPT, **LATENT, "image": IMAGE, "mask_image": MASK, "height": 16, "width": 16},
        True,
        custom=("sigmas",),
    ),
    "FluxPipeline": Case(flux, SHIFTED, {**PROMPT, **LATENT, "height": 16, "width": 16}, custom=("sigmas",)),
    "FluxImg2ImgPipeline": Case(
        flux, SHIFTED, {**PROMPT, **LATENT, "image": IMAGE, "height": 16, "width": 16}, True, custom=("sigmas",)
    ),
    "FluxInpaintPipeline": Case(
        flux,
        SHIFTED,
        {**PROMPT, **LATENT, "image": IMAGE, "mask_image": MASK, "height": 16, "width": 16},
        True,
        custom=("sigmas",),
    ),
    "DiTPipeline": Case(
        lambda: {"transformer": shared("dit", num_embeds_ada_norm=1000), "vae": shared("vae")},
        ("DDIMScheduler", {"clip_sample": False}),
        {"class_labels": [7], "output_type": "np"},
    ),
    "DDPMPipeline": Case(lambda: {"unet": shared("unet_2d", num_class_embeds=None)}, CLIPPED, {"output_type": "np"}),
    "DDIMPipeline": Case(
        lambda: {"unet": shared("unet_2d", num_class_embeds=None)}, ("DDIMScheduler", {}), {"output_type": "np"}
    ),
    "KandinskyV22Pipeline": Case(kandinsky, KANDINSKY, {**EMBEDS, **LATENT, "height": 64, "width": 64}),
    "KandinskyV22Img2ImgPipeline": Case(
        kandinsky, DDIM, {**EMBEDS, **LATENT, "image": IMAGE, "height": 64, "width": 64}, True, False
    ),
    "IFPipeline": Case(deepfloyd, THRESHOLDED, {**TEXT, "output_type": "pt"}, custom=("timesteps",)),
    "IFImg2ImgPipeline": Case(deepfloyd, THRESHOLDED, {**TEXT, "image": IMAGE[..., :8, :8], "output_type": "pt"}, True),
    "PixArtAlphaPipeline": Case(
        pixart,
        ("DPMSolverMultistepScheduler", {**builders.SD_BETAS, "timestep_spacing": "trailing"}),
        {**TEXT, **MASKS, **LATENT, "negative_prompt": None, "use_resolution_binning": False},
        custom=BOTH,
    ),
}
