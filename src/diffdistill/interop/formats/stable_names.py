"""Parameters of Stable Diffusion's own files, under the names that diffusers and transformers give them.

Records only: a convolution of one pixel becomes a linear layer, and a joint matrix its parts, by sizes and strides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord

Records = dict[str, TensorRecord]

UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
PROJECTION = "text_projection"
OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def renamed(records: Mapping[str, Any], rename: Callable[[str], str], part: str) -> Records:
    """Records under new names.

    Raises:
        ForeignFileError: one of them is no tensor, or `rename` does not know its name.
    """
    result: Records = {}
    for name, record in records.items():
        if not isinstance(record, TensorRecord):
            raise ForeignFileError(f"entry {name[:80]!r} of the {part} is not a tensor")
        try:
            result[rename(name)] = record
        except (KeyError, ValueError, IndexError):
            raise ForeignFileError(
                f"the {part} has a parameter {name[:80]!r} that Stable Diffusion's has not"
            ) from None
    return result


def unet(records: Mapping[str, Any], num_blocks: int) -> Records:
    """Parameters of the U-Net with `num_blocks` residual blocks a level, as `UNet2DConditionModel` names them."""

    def rename(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in UNET_TOP:
            return f"{UNET_TOP[stem]}.{kind}"
        part, first, *inner = stem.split(".")
        if part == "middle_block":
            place, residual = MIDDLE[int(first)], int(first) != 1
        else:
            index, layer, down = int(first), int(inner.pop(0)), part == "input_blocks"
            block, within = divmod(index - 1 if down else index, num_blocks + 1)
            side = f"{'down' if down else 'up'}_blocks.{block}"
            if inner == ["op"] and down:
                return f"{side}.downsamplers.0.conv.{kind}"
            if inner == ["conv"] and not down:
                return f"{side}.upsamplers.0.conv.{kind}"
            residual = layer == 0
            place = f"{side}.{'resnets' if residual else 'attentions'}.{within}"
        rest = ".".join(inner)
        return f"{place}.{UNET_RESIDUAL[rest] if residual else rest}.{kind}"

    return renamed(records, rename, "U-Net")


ORIGINAL = re.compile(r"^(?:(input|output)_blocks_(\d+)_(\d)|middle_block_(\d))_(.+)$")


def lora_name(name: str, num_blocks: int) -> str:
    """The name that the kohya tools give a layer of the U-Net, with underscores, as `UNet2DConditionModel` has it.

    Those that are no layers of the original code are returned as they are.
    """
    flat = {original.replace(".", "_"): ours for original, ours in UNET_TOP.items()}
    residual = {original.replace(".", "_"): ours for original, ours in UNET_RESIDUAL.items()}
    match = ORIGINAL.match(name)
    if match is None:
        return flat.get(name, name).replace(".", "_")
    side, index, layer, middle, rest = match.groups()
    if middle is not None:
        place = MIDDLE[int(middle)] if int(middle) < len(MIDDLE) else name
        return f"{place}.{residual.get(rest, rest) if middle != '1' else rest}".replace(".", "_")
    down = side == "input"
    block, within = divmod(int(index) - down, num_blocks + 1)
    start = f"{'down' if down else 'up'}_blocks.{block}"
    if rest in ("op", "conv"):
        return f"{start}.{'down' if down else 'up'}samplers.0.conv".replace(".", "_")
    kind = "resnets" if layer == "0" else "attentions"
    return f"{start}.{kind}.{within}.{residual.get(rest, rest) if layer == '0' else rest}".replace(".", "_")


def autoencoder(records: Mapping[str, Any], levels: int) -> Records:
    """Parameters of the first stage with `levels` levels, as `AutoencoderKL` names them, without its loss."""

    def rename(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        side, _, rest = stem.partition(".")
        if side in ("quant_conv", "post_quant_conv") or rest in ("conv_in", "conv_out"):
            return name
        if rest == "norm_out":
            return f"{side}.conv_norm_out.{kind}"
        parts = rest.replace("nin_shortcut", "conv_shortcut").split(".")
        if parts[0] == "mid":
            if parts[1] == "attn_1":
                return f"{side}.mid_block.attentions.0.{VAE_ATTENTION['.'.join(parts[2:])]}.{kind}"
            return f"{side}.mid_block.resnets.{['block_1', 'block_2'].index(parts[1])}.{'.'.join(parts[2:])}.{kind}"
        down = ["up", "down"].index(parts[0])
        level = int(parts[1]) if down else levels - 1 - int(parts[1])
        place = f"{side}.{parts[0]}_blocks.{level}"
        if parts[2] == "block":
            return f"{place}.resnets.{int(parts[3])}.{'.'.join(parts[4:])}.{kind}"
        return f"{place}.{ {'downsample': 'downsamplers', 'upsample': 'upsamplers'}[parts[2]] }.0.{parts[3]}.{kind}"

    kept = {name: record for name, record in records.items() if not name.startswith("loss.")}
    result = renamed(kept, rename, "autoencoder")
    return {name: _linear(record) if ".attentions." in name else record for name, record in result.items()}


def _linear(record: TensorRecord) -> TensorRecord:
    """A convolution of one pixel as a matrix."""
    if record.size[2:] != (1, 1):
        return record
    return replace(record, size=record.size[:2], stride=record.stride[:2])


def clip(records: Mapping[str, Any]) -> Records:
    """Parameters of CLIP's text encoder, as `CLIPTextModel` names them, without `text_model.`."""
    kept = {name: record for name, record in records.items() if not name.endswith("position_ids")}
    return renamed(kept, lambda name: name.removeprefix("text_model."), "text encoder")


def open_clip(records: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> Records:
    """Parameters of OpenCLIP's text encoder, as `CLIPTextModelWithProjection` names them, without `text_model.`.

    Those whose names begin with one of `dropped` are left out.
    """
    dropped = ("logit_scale", "attn_mask", *dropped)
    top = {
        PROJECTION: f"{PROJECTION}.weight",
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    joint = {name: record for name, record in records.items() if ".attn.in_proj_" in name}

    def rename(name: str) -> str:
        if name in top:
            return top[name]
        stem, _, kind = name.removeprefix("transformer.resblocks.").rpartition(".")
        index, _, rest = stem.partition(".")
        return f"encoder.layers.{int(index)}.{OPEN_CLIP[rest]}.{kind}"

    kept = {name: record for name, record in records.items() if not name.startswith(dropped)}
    result = renamed({name: record for name, record in kept.items() if name not in joint}, rename, "text encoder")
    for name in joint.keys() & kept.keys():
        index, kind = name.split(".")[2], name.rpartition("_")[2]
        for part, record in zip("qkv", _thirds(joint[name]), strict=True):
            result[f"encoder.layers.{int(index)}.self_attn.{part}_proj.{kind}"] = record
    if PROJECTION in kept:
        result[f"{PROJECTION}.weight"] = _transposed(result[f"{PROJECTION}.weight"])
    return result


def _transposed(record: TensorRecord) -> TensorRecord:
    """A matrix that multiplies from the right as one that multiplies from the left."""
    return replace(record, size=record.size[::-1], stride=record.stride[::-1])


def _thirds(record: Any) -> list[TensorRecord]:
    """The three blocks of rows of a matrix or vector."""
    if not isinstance(record, TensorRecord) or not record.size or record.size[0] % 3:
        raise ForeignFileError("the text encoder is damaged: its attention does not divide into q, k and v")
    rows = record.size[0] // 3
    step = rows * record.stride[0]
    size = (rows, *record.size[1:])
    return [replace(record, offset=record.offset + i * step, size=size) for i in range(3)]
