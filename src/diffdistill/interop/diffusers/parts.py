"""A pipeline of diffusers as a denoiser, with its autoencoder and its text encoder beside it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers.levels import levels_of
from diffdistill.interop.diffusers.networks import FAMILIES, FluxTransformer, UNet2D
from diffdistill.models.building import build_denoiser
from diffdistill.models.network import NetworkDenoiser
from diffdistill.registry import choose

CONSISTENCY = re.compile(r"LatentConsistency|\bLCM")
"""Names of the pipelines and schedulers of latent consistency models."""
RECORD = "guidance_convention"
"""The entry of a UNet's config.json that says how it takes the guidance weight, and in which range."""


@dataclass(frozen=True, eq=False)
class LatentCodec:
    """An autoencoder between images and scaled latents.

    Attributes:
        vae: an `AutoencoderKL`.
    """

    vae: Any

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to latents `[B, C, h, w]`; drawn with a generator, else the mode."""
        options = self.vae.config
        with self._upcast() as dtype:
            posterior = self.vae.encode(images.to(dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return ((latents - (options.shift_factor or 0.0)) * options.scaling_factor).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to images `[B, 3, H, W]`, about in [-1, 1]; differentiable in the latents."""
        options = self.vae.config
        scaled = latents / options.scaling_factor + (options.shift_factor or 0.0)
        keep = torch.is_grad_enabled() and latents.requires_grad
        with torch.set_grad_enabled(keep), self._upcast() as dtype:
            return self.vae.decode(scaled.to(dtype)).sample.to(latents.dtype)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.vae.config.out_channels

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @contextmanager
    def _upcast(self) -> Iterator[torch.dtype]:
        """The dtype to compute in: that of the weights, or float32 in place of half where the config asks for it."""
        stored = next(self.vae.parameters()).dtype
        upcast = stored == torch.float16 and self.vae.config.get("force_upcast", False)
        try:
            yield (self.vae.float() if upcast else self.vae).dtype
        finally:
            if upcast:
                self.vae.half()


@dataclass(frozen=True, eq=False)
class Parts:
    """The denoiser, autoencoder and text encoder of a pipeline, for use without it.

    Attributes:
        denoiser: of latents, or of images where there is no codec.
        codec: the autoencoder, or None.
        prompts: maps texts to the condition of the denoiser, or None for models without text.
        pipeline: the pipeline itself.
    """

    denoiser: NetworkDenoiser
    codec: LatentCodec | None
    prompts: Callable[[Sequence[str]], dict[str, Tensor]] | None
    pipeline: Any


def from_network(
    network: Any,
    scheduler: Any,
    *,
    null: Mapping[str, Tensor] | None = None,
    null_class: int | None = None,
    w_range: tuple[float, float] | None = None,
    guidance_convention: str | None = None,
    distilled: Distilled | None = None,
) -> NetworkDenoiser:
    """A network of diffusers with the noise levels of a scheduler, as a denoiser.

    Args:
        network: a `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, `SD3Transformer2DModel` or
            `FluxTransformer2DModel`; it is not copied.
        scheduler: says what the network predicts, at which noise levels.
        null: the parts of the condition without information (the empty prompt's), without a batch dimension.
        null_class: the row of a `UNet2DModel`'s table of classes that stands for no class.
        w_range: the guidance weights of a network that takes one; by default what its config says.
        guidance_convention: "w" or "scale", as in `GUIDANCE_CONVENTIONS`; by default what its config says.
        distilled: how a few-step student is to be sampled.

    Raises:
        ValueError: an unknown network or prediction type, or a network that takes a guidance weight in a way that
            neither its config nor the arguments say.
    """
    kind, options = type(network).__name__, network.config
    if getattr(network, "peft_config", None):
        raise ValueError(
            "the network has adapters: merge them first (fuse_lora and unload_lora_weights of the pipeline)"
        )
    family = choose("network of diffusers", kind, FAMILIES)
    flux = family is FluxTransformer
    levels = levels_of(scheduler, time_scale=1.0 if flux else 1000.0)
    convention, w_range, w_channels = _guidance_input(options, w_range, guidance_convention, flux=flux)
    shapes = {name: list(value.shape) for name, value in (null or {}).items()}
    common: dict[str, Any] = {"w_channels": w_channels, "guidance_convention": convention, "null": shapes}
    if family is UNet2D:
        common["null_class"] = null_class
    wrapped = family(network, **common)
    wrapped.set_null(null or {})
    reference = next(network.parameters())
    wrapped.to(device=reference.device)
    plain = {key: value for key, value in dict(options).items() if not key.startswith("_") and key != RECORD}
    config = {
        "network": {"name": "diffusers", "kind": kind, "options": plain, **common},
        "preconditioning": levels.preconditioning,
        "data_shape": _data_shape(options, flux=flux),
        "num_classes": wrapped.label_dim,
        "sigma_min": levels.sigma_min,
        "sigma_max": levels.sigma_max,
        "w_range": w_range,
        "distilled": None if distilled is None else {"sigmas": list(distilled.sigmas), "sampler": distilled.sampler},
        "provenance": {"format": "diffusers", "class": kind, "scheduler": type(scheduler).__name__},
    }
    denoiser = build_denoiser(config, network=wrapped)
    return denoiser.to(reference.device).eval()


def _data_shape(options: Any, *, flux: bool) -> list[int]:
    """`(C, H, W)` of what is denoised."""
    if flux:
        return [options.in_channels // 4, 128, 128]
    channels = options.out_channels or options.in_channels
    if options.get("norm_type") == "ada_norm_zero":  # DiT, which predicts a variance too
        channels = options.in_channels
    size = options.sample_size or 64
    return [channels, size, size] if isinstance(size, int) else [channels, *size]


def _guidance_input(
    options: Any, w_range: tuple[float, float] | None, convention: str | None, *, flux: bool
) -> tuple[str, tuple[float, float] | None, int]:
    """Convention, range and width of a guidance weight that the network takes; width 0 if it takes none."""
    channels = 256 * bool(options.get("guidance_embeds")) if flux else options.get("time_cond_proj_dim") or 0
    record = options.get(RECORD) or {}
    if flux:
        convention = convention or "scale"
    if not channels:
        if w_range is not None:
            raise ValueError(f"this network takes no guidance weight: leave out w_range={w_range}")
        return convention or "w", None, 0
    convention = convention or record.get("embeds")
    if convention is None:
        raise ValueError(
            "this network takes a guidance weight, but its config does not say in which convention: write "
            f'"{RECORD}": {{"embeds": "w"}} (models of Meng et al., latent consistency models) or '
            '{"embeds": "scale"} (invertible-CD) into its config.json, or give guidance_convention= to from_network, '
            "or hints.guidance_convention=w to diffdistill convert FOLDER FILE"
        )
    low, high = w_range or record.get("w_range") or (0.0, 14.0)
    return convention, (low, high), channels


def from_pipeline(
    pipeline: Any,
    *,
    w_range: tuple[float, float] | None = None,
    guidance_convention: str | None = None,
    null_class: int | None = None,
) -> Parts:
    """Take a pipeline of diffusers apart: Stable Diffusion 1, 2, XL and 3, FLUX, DiT, or an unconditional one.

    Args:
        pipeline: a loaded pipeline.
        w_range: as in `from_network`.
        guidance_convention: as in `from_network`.
        null_class: as in `from_network`.

    Raises:
        ValueError: as `from_network`, or the refiner of SDXL.
    """
    network = getattr(pipeline, "unet", None)
    network = getattr(pipeline, "transformer", None) if network is None else network
    if network is None:
        raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer")
    choose("network of diffusers", type(network).__name__, FAMILIES)
    if pipeline.config.get("requires_aesthetics_score"):
        raise ValueError("this is the refiner of Stable Diffusion XL, which is not read: the base model is")
    prompts = _prompt_encoder(pipeline) if hasattr(pipeline, "encode_prompt") else None
    null = None
    if prompts is not None:
        empty = prompts([""])
        zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
        null = {n: (v[0] * 0 if zeros else v[0]) for n, v in empty.items() if n != "time_ids"}
    record = network.config.get(RECORD) or {}
    distilled = record.get("distilled")
    consistency = f"{type(pipeline).__name__} {type(pipeline.scheduler).__name__}"
    if guidance_convention is None and not record.get("embeds") and CONSISTENCY.search(consistency):
        guidance_convention = "w"  # Luo et al. 2023 (latent consistency models) embed w as Meng et al. do
    denoiser = from_network(
        network,
        pipeline.scheduler,
        null=null,
        null_class=null_class,
        w_range=w_range,
        guidance_convention=guidance_convention,
        distilled=None if distilled is None else Distilled(tuple(distilled["sigmas"]), distilled["sampler"]),
    )
    vae = getattr(pipeline, "vae", None)
    return Parts(denoiser, None if vae is None else LatentCodec(vae.eval()), prompts, pipeline)


def _prompt_encoder(pipeline: Any) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Prompts to the condition of the pipeline's network, by the pipeline's own encoding."""
    tokenizer = getattr(pipeline, "tokenizer", None)

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        prompts = list(prompts)
        if tokenizer is not None:
            longest = tokenizer.model_max_length
            for prompt in prompts:
                tokens = len(tokenizer(prompt, truncation=False).input_ids)
                if tokens > longest:
                    warnings.warn(f"a prompt of {tokens} tokens was cut to {longest}: {prompt[:40]!r}", stacklevel=2)
        name = type(pipeline).__name__
        if name.startswith("Flux"):
            embeddings, pooled, _ = pipeline.encode_prompt(prompts, None)
            return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
        if name.startswith("StableDiffusion3"):
            embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
        device = pipeline.unet.device
        if name.startswith("StableDiffusionXL"):
            embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, None, device, 1, False)
            side = float(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
            ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=device, dtype=embeddings.dtype)
            return {
                "encoder_hidden_states": embeddings,
                "text_embeds": pooled,
                "time_ids": ids.expand(len(prompts), 6),
            }
        embeddings, _ = pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": embeddings}

    return encode
