"""Stable Diffusion 1, 2 and XL in their own files: the U-Net, and the autoencoder and text encoders beside it.

They are built as networks of diffusers and transformers, so that they train, sample and export as such. The files hold
no vocabulary: a whole pipeline needs a tokenizer from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.parts import from_network
from diffdistill.interop.formats import stable_names
from diffdistill.interop.formats.building import ForeignModel, build_part, count_of, size_of, with_prefix
from diffdistill.interop.formats.stable_text import empty_prompt, text_encoders
from diffdistill.interop.formats.unets import Architecture, Hints

AUTOENCODER = "first_stage_model."
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The noise levels that all versions were trained with."""
Prediction = Literal["eps", "v"]
STATED: dict[str, Prediction] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
"""What `modelspec.prediction_type` says."""
MAX_RESOLUTION = 8192
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
TIME_IDS = 6
"""Numbers that Stable Diffusion XL takes beside the pooled text: sizes before and after cropping, and its corner."""
TOKENS = 77


@dataclass(frozen=True)
class Version:
    """Settings of a version of Stable Diffusion that its files do not hold.

    Attributes:
        name: of the model.
        scaling: what latents are multiplied by (Rombach et al. 2022, Appendix G: the inverse of their standard
            deviation).
        published: what its released U-Nets have.
    """

    name: str
    scaling: float
    published: Hints


def read_stable_diffusion(
    checkpoint: ForeignCheckpoint,
    records: Mapping[str, Any],
    architecture: Architecture,
    betas: list[float] | None,
    hints: Hints | None = None,
) -> ForeignModel:
    """Read Stable Diffusion 1, 2 or XL, also their inpainting models.

    Args:
        checkpoint: the file.
        records: the parameters of the U-Net.
        architecture: what they say.
        betas: those in the file; None for the published ones.
        hints: what the parameters do not say.

    Returns:
        The denoiser, and in `settings` the parts of a pipeline: `unet`, `scheduler`, `vae`, `text_encoder` and, for XL,
        `text_encoder_2` (None where the file has none).

    Raises:
        ForeignFileError: it is damaged or of another model, or does not say what it predicts.
        ImportError: the extra is missing.
    """
    diffusers()
    state = checkpoint.state
    hints = hints or Hints()
    stated = said_of_itself(checkpoint, hints.prediction)
    version = _version(state, architecture, hints.prediction or stated.prediction)
    hints = hints.over(stated).over(version.published)
    texts = text_encoders(checkpoint, state, xl=architecture.vector_dim > 0)
    unet = _unet(checkpoint, records, architecture, hints, _added(architecture, texts))
    vae = _autoencoder(checkpoint, state, hints, version.scaling)
    parts = {"unet": unet, "scheduler": _scheduler(checkpoint, hints, betas), "vae": vae, **texts}
    names = {"vae": "autoencoder", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
    held = [name for part, name in names.items() if parts.get(part) is not None]
    further = unet.config.in_channels - unet.config.out_channels
    beside = {0: "", 5: " with a mask"}.get(further, f" with {further} further channels")
    description = (
        f"{version.name}, U-Net on {unet.config.out_channels}x{hints.image_size}x{hints.image_size} latents{beside}, "
        f"text of {architecture.context_dim} channels, predicting {hints.prediction}; it holds "
        + (f"the {', '.join(held[:-1])}{' and ' * (len(held) > 1)}{held[-1]}" if held else "no other parts")
    )
    denoiser = from_network(unet, parts["scheduler"], null=_null(architecture, unet, texts))
    return ForeignModel("stable-diffusion", denoiser, description, settings=parts)


def _version(state: Mapping[str, Any], architecture: Architecture, prediction: Prediction | None) -> Version:
    """The versions are told apart by the width of their text, and XL by the vector that it takes beside the text.

    Raises:
        ForeignFileError: it is a related model of another kind, or version 2 and nothing says what it predicts.
    """
    strange = next((name for name in state if name.startswith(("edm_mean", "edm_vpred."))), None)
    if strange is not None:
        raise ForeignFileError(
            f"the file has the entry {strange}: Stable Diffusion with noise levels of EDM is not read"
        )
    width = architecture.context_dim
    if architecture.vector_dim and width == 1280:
        raise ForeignFileError("this is the refiner of Stable Diffusion XL, which is not read: the base model is")
    if architecture.vector_dim and width == 1024:
        raise ForeignFileError("this Stable Diffusion 2 takes an image beside the text (unCLIP), which is not read")
    if architecture.vector_dim:
        published = Hints(image_size=128, head_channels=64, prediction=prediction or "eps")
        return Version("Stable Diffusion XL", 0.13025, published)
    if width == 1024:
        if prediction is None:
            raise ForeignFileError(
                "the file does not say what this Stable Diffusion 2 predicts: give hints.prediction=v (those of 768 "
                "pixels) or hints.prediction=eps (those of 512)"
            )
        size = 64 if prediction == "eps" else 96
        return Version("Stable Diffusion 2", 0.18215, Hints(image_size=size, head_channels=64, prediction=prediction))
    return Version("Stable Diffusion", 0.18215, Hints(image_size=64, num_heads=8, prediction=prediction or "eps"))


def said_of_itself(checkpoint: ForeignCheckpoint, asked: Prediction | None = None) -> Hints:
    """What the metadata of a file say, as programs that train write them, or empty tensors of later conventions.

    What the network predicts is `asked`, where that is not None.

    Raises:
        ForeignFileError: they contradict each other, or say something that is not known.
    """
    metadata = checkpoint.metadata
    said: dict[str, Prediction] = {}
    stated = metadata.get("modelspec.prediction_type") if asked is None else None
    if stated is not None:
        if stated not in STATED:
            raise ForeignFileError(
                f"modelspec.prediction_type={stated[:40]!r} is unknown: give hints.prediction=eps or v"
            )
        said["modelspec.prediction_type"] = STATED[stated]
    if metadata.get("modelspec.architecture", "").endswith(("-768-v", "-v")):
        said["modelspec.architecture"] = "v"
    if metadata.get("ss_v_parameterization") == "True":
        said["ss_v_parameterization"] = "v"
    if "v_pred" in checkpoint.state:
        said["v_pred"] = "v"
    if asked is not None:
        said = {"hints.prediction": asked}
    if len(set(said.values())) > 1:
        raise ForeignFileError(f"the file contradicts itself ({', '.join(said)}): give hints.prediction=eps or v")
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    square = width.isdigit() and width == height and int(width) % 8 == 0 and 0 < int(width) <= MAX_RESOLUTION
    prediction: Any = next(iter(said.values()), None)
    return Hints(prediction=prediction, image_size=int(width) // 8 if square else None)


def _scheduler(checkpoint: ForeignCheckpoint, hints: Hints, betas: list[float] | None) -> Any:
    schedule: dict[str, Any] = {"trained_betas": betas} if betas and not _published_betas(betas) else dict(BETAS)
    # Trained down to a signal of zero: an empty tensor beside v_pred, or an entry of the metadata.
    if "ztsnr" in checkpoint.state or checkpoint.metadata.get("ss_zero_terminal_snr") == "True":
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return diffusers().DDIMScheduler(
        **schedule,
        prediction_type=PREDICTIONS[hints.prediction or "eps"],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _null(architecture: Architecture, unet: Any, texts: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The condition without information: the empty prompt, or zeros in XL; None where the file does not have it."""
    text = texts["text_encoder"]
    if not architecture.vector_dim:
        return None if text is None else {"encoder_hidden_states": empty_prompt(text)}
    tokens = TOKENS if text is None else text.config.max_position_embeddings
    pooled = architecture.vector_dim - TIME_IDS * unet.config.addition_time_embed_dim
    return {"encoder_hidden_states": torch.zeros(tokens, architecture.context_dim), "text_embeds": torch.zeros(pooled)}


def _added(architecture: Architecture, texts: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a U-Net that takes a vector of pooled text and embedded sizes.

    Raises:
        ForeignFileError: the vector does not divide so.
    """
    if not architecture.vector_dim:
        return {}
    text = texts.get("text_encoder_2")
    each = 256 if text is None else (architecture.vector_dim - text.config.projection_dim) // TIME_IDS
    pooled = architecture.vector_dim - TIME_IDS * each
    if each < 1 or pooled < 1 or (text is not None and pooled != text.config.projection_dim):
        raise ForeignFileError(
            f"the U-Net takes a vector of {architecture.vector_dim} numbers, which are not a pooled text and "
            f"{TIME_IDS} embedded sizes"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": architecture.vector_dim,
    }


def _published_betas(betas: list[float]) -> bool:
    ends = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, BETAS["num_train_timesteps"]) ** 2
    # Files in half precision hold them rounded, to 8 bits in bfloat16.
    return len(betas) == len(ends) and torch.allclose(torch.tensor(betas), ends, rtol=2**-8, atol=0)


def _unet(
    checkpoint: ForeignCheckpoint,
    records: Mapping[str, Any],
    architecture: Architecture,
    hints: Hints,
    added: Mapping[str, Any],
) -> Any:
    widths = [round(architecture.model_channels * ratio) for ratio in architecture.channel_mult]
    heads = [hints.num_heads or width // (hints.head_channels or 64) for width in widths]
    heads = [count if has else max(count, 1) for count, has in zip(heads, architecture.attention, strict=True)]
    if not all(heads):
        raise ForeignFileError(f"levels of {widths} channels do not divide into heads: give hints.num_heads")
    attention = architecture.attention
    options: dict[str, Any] = {
        "sample_size": hints.image_size,
        "in_channels": architecture.img_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": widths,
        "layers_per_block": architecture.num_blocks,
        "cross_attention_dim": architecture.context_dim,
        "attention_head_dim": heads,  # diffusers calls the number of heads so
        "transformer_layers_per_block": list(architecture.transformer_depth),
        "use_linear_projection": len(records["middle_block.1.proj_in.weight"].size) == 2,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        **added,
    }
    mapped = stable_names.unet(records, architecture.num_blocks)
    return build_part(lambda: diffusers().UNet2DConditionModel(**options), mapped, checkpoint, part="U-Net")


def _autoencoder(checkpoint: ForeignCheckpoint, state: Mapping[str, Any], hints: Hints, scaling: float) -> Any:
    records = with_prefix(state, AUTOENCODER)
    if not records:
        return None
    levels, blocks = count_of(records, "encoder.down."), count_of(records, "encoder.down.0.block.")
    options: dict[str, Any] = {
        "in_channels": size_of(records, "encoder.conv_in.weight", 1, "autoencoder"),
        "out_channels": size_of(records, "decoder.conv_out.weight", 0, "autoencoder"),
        "latent_channels": size_of(records, "post_quant_conv.weight", 1, "autoencoder"),
        "block_out_channels": [
            size_of(records, f"encoder.down.{i}.block.0.conv1.weight", 0, "autoencoder") for i in range(levels)
        ],
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": (hints.image_size or 64) << (levels - 1),
        "scaling_factor": scaling,
    }
    mapped = stable_names.autoencoder(records, levels)
    return build_part(lambda: diffusers().AutoencoderKL(**options), mapped, checkpoint, part="autoencoder")
