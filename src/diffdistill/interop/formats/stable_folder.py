"""Stable Diffusion from its own file as a folder of diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffdistill.errors import one_line
from diffdistill.files.atomic import new_folder
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.formats.building import ForeignModel

TASKS = {4: "", 9: "Inpaint"}
"""Stock pipelines by the input channels of their U-Net: latents alone, or with a mask and what lies around it."""


def write_pipeline(found: ForeignModel, tokenizer: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write Stable Diffusion as a folder of diffusers, with a tokenizer from elsewhere.

    Args:
        found: from `read_foreign`.
        tokenizer: the folder of CLIP's tokenizer, with `vocab.json` and `merges.txt`; both text encoders of XL use it.
        folder: where to write; it must be empty or new.

    Raises:
        ValueError: another model, one without autoencoder or text encoders, no tokenizer there, one of another
            vocabulary, a U-Net that takes another image beside the latents, or a folder with files in it.
    """
    parts = dict(found.settings)
    if found.kind != "stable-diffusion" or any(part is None for part in parts.values()):
        raise ValueError("only Stable Diffusion with its autoencoder and text encoders becomes a folder of diffusers")
    with new_folder(folder) as made:
        _pipeline(parts, tokenizer).save_pretrained(made, safe_serialization=True)
    return Path(folder)


def _pipeline(parts: dict[str, Any], tokenizer: str | os.PathLike[str]) -> Any:
    parts["tokenizer"] = _tokenizer(tokenizer, parts["text_encoder"])
    if "text_encoder_2" in parts:
        parts["tokenizer_2"] = _tokenizer(tokenizer, parts["text_encoder_2"])
        family, options = "StableDiffusionXL", {"add_watermarker": False}
    else:
        family = "StableDiffusion"
        options = dict.fromkeys(("safety_checker", "feature_extractor")) | {"requires_safety_checker": False}
    channels = parts["unet"].config.in_channels
    if channels not in TASKS:
        raise ValueError(f"no folder is written around a U-Net of {channels} input channels: leave out the tokenizer")
    return getattr(diffusers(), f"{family}{TASKS[channels]}Pipeline")(**parts, **options)


def _tokenizer(source: str | os.PathLike[str], encoder: Any) -> Any:
    """The tokenizer of a folder, with the padding of a text encoder.

    Raises:
        ValueError: there is none, or it has another vocabulary.
    """
    length, vocabulary = encoder.config.max_position_embeddings, encoder.config.vocab_size
    padding = {} if encoder.config.pad_token_id else {"pad_token": "!"}
    try:
        made = diffusers("transformers").CLIPTokenizer.from_pretrained(
            str(source), local_files_only=True, model_max_length=length, **padding
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"no tokenizer of CLIP at {str(source)!r}: {one_line(error)}") from None
    if len(made) != vocabulary:
        raise ValueError(f"the tokenizer has {len(made)} tokens, but the text encoder {vocabulary}")
    return made
