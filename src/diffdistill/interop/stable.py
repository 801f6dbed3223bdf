"""Stable Diffusion 1 and 2 in their own files: the U-Net, and the autoencoder and text encoder beside it.

They are built as networks of diffusers and transformers, so that they train, sample and export as such. The files hold
no vocabulary: a whole pipeline needs a tokenizer from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdistill.interop import stable_names
from diffdistill.interop.building import Found, whole
from diffdistill.interop.checkpoints import Checkpoint
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.parts import from_network
from diffdistill.interop.records import ForeignFileError
from diffdistill.interop.tensors import TensorRecord
from diffdistill.interop.unets import Architecture, Hints
from diffdistill.models.files import load_state

AUTOENCODER = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
SCALING = 0.18215
"""What latents are multiplied by (Rombach et al. 2022, Appendix G: the inverse of their standard deviation)."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The noise levels that both versions were trained with."""
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def read_stable_diffusion(
    checkpoint: Checkpoint,
    records: Mapping[str, Any],
    architecture: Architecture,
    betas: list[float] | None,
    hints: Hints | None = None,
) -> Found:
    """Read Stable Diffusion 1 or 2, also their inpainting models.

    Args:
        checkpoint: the file.
        records: the parameters of the U-Net.
        architecture: what they say.
        betas: those in the file; None for the published ones.
        hints: what the parameters do not say.

    Returns:
        The denoiser, and in `settings` the parts of a pipeline: `unet`, `scheduler`, `vae` and `text_encoder` (None
        where the file has none).

    Raises:
        ForeignFileError: it is damaged or of another model, or does not say what it predicts.
        ImportError: the extra is missing.
    """
    diffusers()
    hints = hints or Hints()
    hints = hints.over(_published(architecture, hints.prediction))
    if hints.prediction is None:
        raise ForeignFileError(
            "the file does not say what this Stable Diffusion 2 predicts: give hints.prediction=v (those of 768 "
            "pixels) or hints.prediction=eps (those of 512)"
        )
    state: Mapping[str, Any] = checkpoint.root["state_dict"]
    unet = _unet(checkpoint, records, architecture, hints)
    vae, text = _autoencoder(checkpoint, state, hints), _text_encoder(checkpoint, state)
    schedule = {"trained_betas": betas} if betas and not _published_betas(betas) else BETAS
    scheduler = diffusers().DDIMScheduler(
        **schedule,
        prediction_type=PREDICTIONS[hints.prediction],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    null = None if text is None else {"encoder_hidden_states": empty_prompt(text)}
    parts = {"unet": unet, "scheduler": scheduler, "vae": vae, "text_encoder": text}
    held = [name for name, part in (("autoencoder", vae), ("text encoder", text)) if part is not None]
    masked = " with a mask" if unet.config.in_channels > unet.config.out_channels else ""
    description = (
        f"Stable Diffusion, U-Net on {unet.config.out_channels}x{hints.image_size}x{hints.image_size} latents{masked}, "
        f"text of {architecture.context_dim} channels, predicting {hints.prediction}; it holds "
        + (f"the {' and '.join(held)}" if held else "no other parts")
    )
    return Found("stable-diffusion", from_network(unet, scheduler, null=null), description, settings=parts)


def _published(architecture: Architecture, prediction: str | None) -> Hints:
    """What versions 1 and 2 have, told apart by the width of their text."""
    if architecture.context_dim == 1024:
        return Hints(image_size=64 if prediction == "eps" else 96, head_channels=64)
    return Hints(image_size=64, num_heads=8, prediction="eps")


def _published_betas(betas: list[float]) -> bool:
    ends = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, BETAS["num_train_timesteps"]) ** 2
    return len(betas) == len(ends) and torch.allclose(torch.tensor(betas), ends, rtol=1e-4, atol=0)


def _built(make: Callable[[], Any], records: Mapping[str, TensorRecord], checkpoint: Checkpoint, part: str) -> Any:
    """A module with the tensors of the file, strictly; nothing is allocated before their shapes fit."""
    try:
        with torch.device("meta"):
            shapes = {name: torch.empty(record.size) for name, record in records.items()}
            load_state(make(), shapes, source=f"the {part}")
        module: nn.Module = make()
        load_state(module, checkpoint.tensors(records), source=f"the {part}")
    except ForeignFileError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        raise ForeignFileError(str(error).partition("\n")[0]) from None
    return module.eval()


def _unet(checkpoint: Checkpoint, records: Mapping[str, Any], architecture: Architecture, hints: Hints) -> Any:
    widths = [round(architecture.model_channels * ratio) for ratio in architecture.channel_mult]
    heads = [hints.num_heads or width // (hints.head_channels or 64) for width in widths]
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
        "use_linear_projection": len(records["middle_block.1.proj_in.weight"].size) == 2,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
    }
    mapped = stable_names.unet(records, architecture.num_blocks)
    return _built(lambda: diffusers().UNet2DConditionModel(**options), mapped, checkpoint, "U-Net")


def _within(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): record for name, record in state.items() if name.startswith(prefix)}


def _size(records: Mapping[str, Any], name: str, axis: int, part: str) -> int:
    record = records.get(name)
    if not isinstance(record, TensorRecord) or len(record.size) <= axis:
        raise ForeignFileError(f"the {part} misses {name}")
    return whole(record.size[axis], name, low=1)


def _count(records: Mapping[str, Any], beginning: str) -> int:
    """Elements of a list of modules."""
    found = {name.removeprefix(beginning).split(".")[0] for name in records if name.startswith(beginning)}
    return whole(len(found), beginning, low=1, high=512)


def _autoencoder(checkpoint: Checkpoint, state: Mapping[str, Any], hints: Hints) -> Any:
    records = _within(state, AUTOENCODER)
    if not records:
        return None
    levels, blocks = _count(records, "encoder.down."), _count(records, "encoder.down.0.block.")
    options: dict[str, Any] = {
        "in_channels": _size(records, "encoder.conv_in.weight", 1, "autoencoder"),
        "out_channels": _size(records, "decoder.conv_out.weight", 0, "autoencoder"),
        "latent_channels": _size(records, "post_quant_conv.weight", 1, "autoencoder"),
        "block_out_channels": [
            _size(records, f"encoder.down.{i}.block.0.conv1.weight", 0, "autoencoder") for i in range(levels)
        ],
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": (hints.image_size or 64) << (levels - 1),
        "scaling_factor": SCALING,
    }
    mapped = stable_names.autoencoder(records, levels)
    return _built(lambda: diffusers().AutoencoderKL(**options), mapped, checkpoint, "autoencoder")


def _text_encoder(checkpoint: Checkpoint, state: Mapping[str, Any]) -> Any:
    first, second = _within(state, CLIP), _within(state, OPEN_CLIP)
    if not first and not second:
        return None
    if first:
        records = stable_names.clip(first)
        layers, activation = _count(records, "encoder.layers."), "quick_gelu"
    else:
        layers, activation = _count(second, "transformer.resblocks.") - 1, "gelu"
        records = stable_names.open_clip(second, whole(layers, "layers of the text encoder", low=1))
    width = _size(records, "embeddings.token_embedding.weight", 1, "text encoder")
    vocabulary = _size(records, "embeddings.token_embedding.weight", 0, "text encoder")
    transformers = diffusers("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_size(records, "encoder.layers.0.mlp.fc1.weight", 0, "text encoder"),
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=_size(records, "embeddings.position_embedding.weight", 0, "text encoder"),
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1 if first else 0,
    )
    # The names have had a prefix in some versions of transformers.
    with torch.device("meta"):
        inner = any(name.startswith("text_model.") for name in transformers.CLIPTextModel(config).state_dict())
    mapped = {f"text_model.{name}" if inner else name: record for name, record in records.items()}
    return _built(lambda: transformers.CLIPTextModel(config), mapped, checkpoint, "text encoder")


@torch.no_grad()
def empty_prompt(text_encoder: Any) -> torch.Tensor:
    """The features of the empty prompt, `[tokens, channels]`: a first token, a last one, and padding."""
    config = text_encoder.config
    padding = [config.pad_token_id] * (config.max_position_embeddings - 2)
    tokens = torch.tensor([[config.bos_token_id, config.eos_token_id, *padding]])
    return text_encoder(tokens).last_hidden_state[0]


def write_pipeline(found: Found, tokenizer: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write Stable Diffusion as a folder of diffusers, with a tokenizer from elsewhere.

    Args:
        found: from `read_foreign`.
        tokenizer: the folder of CLIP's tokenizer, with `vocab.json` and `merges.txt`.
        folder: where to write; it must be empty or new.

    Raises:
        ValueError: another model, one without autoencoder or text encoder, no tokenizer there, one of another
            vocabulary, or a folder with files in it.
    """
    folder, parts = Path(folder), dict(found.settings)
    if found.kind != "stable-diffusion" or parts["vae"] is None or parts["text_encoder"] is None:
        raise ValueError("only Stable Diffusion with its autoencoder and text encoder becomes a folder of diffusers")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new folder")
    encoder, unet = parts["text_encoder"], parts["unet"]
    length, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
    padding = {} if encoder.config.pad_token_id else {"pad_token": "!"}
    try:
        made = diffusers("transformers").CLIPTokenizer.from_pretrained(
            str(tokenizer), local_files_only=True, model_max_length=length, **padding
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"no tokenizer of CLIP at {str(tokenizer)!r}: {' '.join(str(error).split())[:200]}") from None
    if len(made) != vocabulary:
        raise ValueError(f"the tokenizer has {len(made)} tokens, but the text encoder {vocabulary}")
    kind = "StableDiffusionInpaintPipeline" if unet.config.in_channels == 9 else "StableDiffusionPipeline"
    pipeline = getattr(diffusers(), kind)(
        **parts, tokenizer=made, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
