"""The text encoders of Stable Diffusion's own files, as models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.formats import stable_names
from diffdistill.interop.formats.building import bounded_int, build_part, count_of, size_of, with_prefix

CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
FIRST_OF_XL = "conditioner.embedders.0.transformer."
SECOND_OF_XL = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Style:
    """Settings of a text encoder that its parameters do not determine.

    Attributes:
        activation: of its layers.
        pads_with_end: whether texts are padded with their last token; else with the token 0.
        projected: whether it makes a pooled text.
    """

    activation: str
    pads_with_end: bool
    projected: bool = False


def text_encoders(checkpoint: ForeignCheckpoint, state: Mapping[str, Any], *, xl: bool) -> dict[str, Any]:
    """The text encoders by the names that pipelines give them, None for one that the file does not hold.

    Stable Diffusion 2 takes the features before the last layer, normalised, so that its last layer is left out. XL
    (Podell et al. 2023, Section 2.1) takes those before the last layer of both, not normalised, and the second one's
    pooled text, which comes after all layers.

    Args:
        checkpoint: the file.
        state: its state dict.
        xl: whether there are two of them.

    Raises:
        ForeignFileError: one is damaged.
    """
    if xl:
        first, second = with_prefix(state, FIRST_OF_XL), with_prefix(state, SECOND_OF_XL)
        style = Style("gelu", pads_with_end=False, projected=True)
        return {
            "text_encoder": _clip(checkpoint, first),
            "text_encoder_2": _encoder(checkpoint, stable_names.open_clip(second), style) if second else None,
        }
    first, second = with_prefix(state, CLIP), with_prefix(state, OPEN_CLIP)
    if first or not second:
        return {"text_encoder": _clip(checkpoint, first)}
    last = bounded_int(count_of(second, "transformer.resblocks.") - 1, "layers of the text encoder", low=1)
    records = stable_names.open_clip(second, ("text_projection", f"transformer.resblocks.{last}."))
    return {"text_encoder": _encoder(checkpoint, records, Style("gelu", pads_with_end=False))}


def _clip(checkpoint: ForeignCheckpoint, records: Mapping[str, Any]) -> Any:
    if not records:
        return None
    return _encoder(checkpoint, stable_names.clip(records), Style("quick_gelu", pads_with_end=True))


def _encoder(checkpoint: ForeignCheckpoint, records: Mapping[str, Any], style: Style) -> Any:
    part = "text encoder"
    width = size_of(records, "embeddings.token_embedding.weight", 1, part)
    vocabulary = size_of(records, "embeddings.token_embedding.weight", 0, part)
    transformers = diffusers("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=size_of(records, "encoder.layers.0.mlp.fc1.weight", 0, part),
        num_hidden_layers=count_of(records, "encoder.layers."),
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=size_of(records, "embeddings.position_embedding.weight", 0, part),
        hidden_act=style.activation,
        projection_dim=size_of(records, "text_projection.weight", 0, part) if style.projected else width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1 if style.pads_with_end else 0,
    )
    kind = transformers.CLIPTextModelWithProjection if style.projected else transformers.CLIPTextModel
    # Whether names have a prefix depends on the class and on the version of transformers.
    with torch.device("meta"):
        names = {name.removeprefix("text_model."): name for name in kind(config).state_dict()}
    mapped = {names.get(name, name): record for name, record in records.items()}
    return build_part(lambda: kind(config), mapped, checkpoint, part=part)


@torch.no_grad()
def empty_prompt(text_encoder: Any) -> torch.Tensor:
    """The features of the empty prompt, `[tokens, channels]`: a first token, a last one, and padding."""
    config = text_encoder.config
    padding = [config.pad_token_id] * (config.max_position_embeddings - 2)
    tokens = torch.tensor([[config.bos_token_id, config.eos_token_id, *padding]])
    return text_encoder(tokens).last_hidden_state[0]
