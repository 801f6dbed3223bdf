"""FLUX in its own files (Black Forest Labs, 2024): the transformer alone, as a network of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.parts import from_network
from diffdistill.interop.formats.building import ForeignModel, build_part, count_of, size_of, with_prefix

MARK = "double_blocks.0.img_attn.qkv.weight"
PREFIXES = ("", "model.diffusion_model.")
GUIDANCE = "guidance_in.in_layer.weight"
EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
TOP = {"txt_in": "context_embedder", "img_in": "x_embedder", "final_layer.linear": "proj_out"}
SWAPPED = "final_layer.adaLN_modulation.1"
"""Gives shift, then scale; in diffusers scale, then shift."""
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
JOINT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""Matrices whose rows are those of several layers."""
SCHEDULES = {
    True: {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    False: {"shift": 1.0},
}
"""Noise levels of the released models, by whether they take the guidance scale: FLUX.1-dev does, FLUX.1-schnell not."""


def holds_flux(checkpoint: ForeignCheckpoint) -> bool:
    """Whether a checkpoint is one of FLUX."""
    return any(f"{prefix}{MARK}" in checkpoint.state for prefix in PREFIXES)


def read_flux(checkpoint: ForeignCheckpoint) -> ForeignModel:
    """Read the transformer of FLUX.

    Raises:
        ForeignFileError: it is damaged.
        ImportError: the extra is missing.
    """
    library, state = diffusers(), checkpoint.state
    prefix = next(prefix for prefix in PREFIXES if f"{prefix}{MARK}" in state)
    records = {str(name): value for name, value in with_prefix(state, prefix).items()}
    guided, width = GUIDANCE in records, size_of(records, "img_in.weight", 0)
    head = size_of(records, "double_blocks.0.img_attn.norm.query_norm.scale", 0)
    if width % head or head % 16:
        raise ForeignFileError(f"the transformer of width {width} has no heads of {head} channels")
    options = {
        "in_channels": size_of(records, "img_in.weight", 1),
        "num_layers": count_of(records, "double_blocks."),
        "num_single_layers": count_of(records, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": size_of(records, "txt_in.weight", 1),
        "pooled_projection_dim": size_of(records, "vector_in.in_layer.weight", 1),
        "guidance_embeds": guided,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }
    made = build_part(
        lambda: library.FluxTransformer2DModel(**options), transformer(records, width), checkpoint, part="transformer"
    )
    with torch.no_grad():
        for value in made.norm_out.linear.parameters():
            value.copy_(torch.cat(value.chunk(2)[::-1]))
    denoiser = from_network(made, library.FlowMatchEulerDiscreteScheduler(**SCHEDULES[guided]))
    taking = "that takes the guidance scale" if guided else "without a guidance scale"
    return ForeignModel(
        "flux", denoiser, f"FLUX, transformer {taking}, {options['num_layers']} + {options['num_single_layers']} blocks"
    )


def transformer(records: Mapping[str, Any], width: int) -> dict[str, TensorRecord]:
    """Parameters under the names of `FluxTransformer2DModel`; joint matrices become their parts."""
    mapped: dict[str, TensorRecord] = {}
    for name, record in records.items():
        if not isinstance(record, TensorRecord):
            raise ForeignFileError(f"entry {name[:80]!r} of the transformer is not a tensor")
        stem, _, kind = name.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        try:
            places = _places(stem)
        except (KeyError, ValueError):
            raise ForeignFileError(f"the transformer has a parameter {name[:80]!r} that FLUX has not") from None
        rows = [width] * (len(places) - 1) if len(places) > 1 else []
        mapped |= {f"{place}.{kind}": part for place, part in zip(places, _rows(record, rows, name), strict=True)}
    return mapped


def _places(stem: str) -> tuple[str, ...]:
    """The layers of diffusers that a layer becomes."""
    if stem in TOP:
        return (TOP[stem],)
    if stem == SWAPPED:
        return ("norm_out.linear",)
    first, _, rest = stem.partition(".")
    if first in EMBEDDERS:
        return (f"time_text_embed.{EMBEDDERS[first]}.{ {'in_layer': 'linear_1', 'out_layer': 'linear_2'}[rest] }",)
    index, _, layer = rest.partition(".")
    start = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[first]
    layers = JOINT.get(layer) or ((DOUBLE if first == "double_blocks" else SINGLE)[layer],)
    return tuple(f"{start}.{int(index)}.{each}" for each in layers)


def _rows(record: TensorRecord, counts: list[int], name: str) -> list[TensorRecord]:
    """Blocks of rows of a matrix or vector: of so many, and the rest."""
    if not counts:
        return [record]
    rest = record.size[0] - sum(counts) if record.size else 0
    if rest < 1:
        raise ForeignFileError(f"{name[:80]} has too few rows for {len(counts) + 1} layers")
    parts, start = [], 0
    for count in (*counts, rest):
        size = (count, *record.size[1:])
        parts.append(replace(record, offset=record.offset + start * record.stride[0], size=size))
        start += count
    return parts
