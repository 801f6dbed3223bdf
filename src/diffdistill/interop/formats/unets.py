"""The architecture of an ADM-like U-Net, read off the names and shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord
from diffdistill.interop.formats.building import check_size, size_of, with_prefix
from diffdistill.settings import Count, check_fields

VECTOR = "label_emb.0.0.weight"
_STAGE = re.compile(r"(input_blocks|output_blocks)\.(\d{1,4})\.(\d)\.")


@dataclass(frozen=True)
class Hints:
    """Settings that parameters do not determine. None takes those of the published model of this shape.

    Attributes:
        image_size: height and width of what the network takes.
        head_channels: channels of an attention head.
        num_heads: attention heads, in place of `head_channels`.
        attention_order: "heads_first" or "qkv_first".
        noise_levels: name of the table of a discrete-time model, such as "linear" or "iddpm".
        family: "edm" or "consistency", for models of the code of consistency models.
        prediction: "eps" or "v", for Stable Diffusion.
    """

    image_size: Count | None = None
    head_channels: Count | None = None
    num_heads: Count | None = None
    attention_order: Literal["heads_first", "qkv_first"] | None = None
    noise_levels: str | None = None
    family: Literal["edm", "consistency"] | None = None
    prediction: Literal["eps", "v"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def over(self, published: Hints) -> Hints:
        """These hints, and the published ones where these say nothing."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if "head_channels" in given and "num_heads" not in given:
            published = replace(published, num_heads=None)
        return replace(published, **given)


@dataclass(frozen=True)
class Architecture:
    """The architecture of a U-Net, as its parameters determine it.

    Attributes:
        img_channels, out_channels: of the image and the result.
        label_dim: class labels.
        vector_dim: numbers of a vector that is a further condition, as in Stable Diffusion XL; 0 for none.
        model_channels: base number of channels.
        channel_mult: channels of each level over it.
        num_blocks: residual blocks of each level.
        attention: whether each level has attention.
        adaptive_scale, resample, context_dim: as in `OpenAIUNet`.
        transformer_depth: transformer blocks in the attention of each level; of the middle block for levels without.
        planar_attention: q, k and v are made by a convolution over the plane, as in the code of consistency models.
    """

    img_channels: int
    out_channels: int
    label_dim: int
    vector_dim: int
    model_channels: int
    channel_mult: tuple[float, ...]
    num_blocks: int
    attention: tuple[bool, ...]
    adaptive_scale: bool
    resample: str
    context_dim: int
    transformer_depth: tuple[int, ...]
    planar_attention: bool

    def options(self, hints: Hints) -> dict[str, Any]:
        """The options of `OpenAIUNet`, with what `hints` adds."""
        size = hints.image_size
        if size is None:
            raise ForeignFileError(
                f"no published model has the channel_mult {list(self.channel_mult)} with {self.resample} resampling: "
                "give image_size, and what differs from head_channels=64, attention_order=heads_first, "
                "noise_levels=linear"
            )
        if size % 2 ** (len(self.channel_mult) - 1):
            raise ForeignFileError(f"image_size {size} does not halve {len(self.channel_mult) - 1} times")
        options: dict[str, Any] = {
            "model_channels": self.model_channels,
            "channel_mult": list(self.channel_mult),
            "num_blocks": self.num_blocks,
            "attn_resolutions": [size >> level for level, has in enumerate(self.attention) if has],
            "adaptive_scale": self.adaptive_scale,
            "resample": self.resample,
            "attention_order": hints.attention_order or "heads_first",
        }
        if self.context_dim:
            options["context_dim"] = self.context_dim
        if hints.num_heads is not None:
            options["num_heads"] = hints.num_heads
        else:
            options["head_channels"] = hints.head_channels or 64
        return options


def infer(records: Mapping[str, Any], *, decoder: bool = True) -> Architecture:
    """Read an architecture off the shapes of its parameters.

    Args:
        records: a state dict of tensor records.
        decoder: whether there are `output_blocks`; classifiers have none.

    Raises:
        ForeignFileError: the parameters are not those of such a network.
    """
    stages, resample = _levels(records)
    channels = [size_of(records, f"input_blocks.{1 + level[0]}.0.out_layers.0.weight", 0) for level in stages]
    num_blocks = len(stages[0])
    if any(len(level) != num_blocks for level in stages):
        raise ForeignFileError("the levels of the network have different numbers of blocks")
    check_size(len(stages), num_blocks)
    model_channels = size_of(records, "time_embed.0.weight", 1)
    scaled = size_of(records, "input_blocks.1.0.emb_layers.1.weight", 0) == 2 * channels[0]
    attention = tuple(any(_has_attention(records, 1 + index) for index in level) for level in stages)
    to_context = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    context = records.get(to_context)
    plain = records.get("middle_block.1.qkv.weight")
    places = [
        f"input_blocks.{1 + level[0]}" if has else "middle_block" for level, has in zip(stages, attention, strict=True)
    ]
    if not isinstance(context if plain is None else plain, TensorRecord):
        raise ForeignFileError("the network has no attention in its middle block")
    return Architecture(
        img_channels=size_of(records, "input_blocks.0.0.weight", 1),
        out_channels=size_of(records, "out.2.weight", 0) if decoder else size_of(records, "out.2.c_proj.weight", 0),
        label_dim=size_of(records, "label_emb.weight", 0) if "label_emb.weight" in records else 0,
        vector_dim=size_of(records, VECTOR, 1) if VECTOR in records else 0,
        model_channels=model_channels,
        channel_mult=tuple(_ratio(width, model_channels) for width in channels),
        num_blocks=num_blocks,
        attention=attention,
        adaptive_scale=scaled,
        resample=resample,
        context_dim=0 if context is None else size_of(records, to_context, 1),
        transformer_depth=tuple(_depth(records, place) for place in places),
        planar_attention=plain is not None and len(plain.size) == 4,
    )


def _levels(records: Mapping[str, Any]) -> tuple[list[list[int]], str]:
    """Indices, from 0, of the residual blocks of each level among `input_blocks.1` onwards; and the resampling."""
    blocks, strided = set(), set()
    ups = 0
    for name in records:
        match = _STAGE.match(name)
        if match is None:
            continue
        part, index, layer = match[1], int(match[2]), int(match[3])
        rest = name[match.end() :]
        if part == "input_blocks" and index and layer == 0:
            (strided if rest == "op.weight" else blocks).add(index - 1)
        if part == "output_blocks" and layer and rest in ("in_layers.0.weight", "conv.weight"):
            ups += 1
    total = max(blocks | strided, default=-1) + 1
    if not blocks or total > 4096:
        raise ForeignFileError("the file holds no input_blocks: it is not an ADM-like U-Net")
    missing = set(range(total)) - blocks - strided
    if strided or missing:
        cuts, resample = sorted(strided | missing), "conv" if strided else "pool"
        if strided and missing:
            raise ForeignFileError(f"input_blocks.{min(missing) + 1} is missing")
    else:
        cuts, resample = _residual_cuts(records, total, ups), "residual"
    levels: list[list[int]] = [[]]
    for index in range(total):
        if index in cuts:
            levels.append([])
        else:
            levels[-1].append(index)
    if not all(levels):
        raise ForeignFileError("a level of the network has no blocks")
    return levels, resample


def _residual_cuts(records: Mapping[str, Any], total: int, ups: int) -> list[int]:
    """Where residual blocks halve the resolution: they look like others, but every level has as many blocks.

    A decoder shows the number of levels. Without one, in classifiers, it is the one for which every level has the same
    width and the same attention throughout.
    """
    found = []
    for cuts in [ups] if ups else range(total):
        if (total - cuts) % (cuts + 1):
            continue
        blocks = (total - cuts) // (cuts + 1)
        places = [blocks + level * (blocks + 1) for level in range(cuts)]
        levels = [range(level * (blocks + 1), level * (blocks + 1) + blocks) for level in range(cuts + 1)]
        if (
            blocks
            and not any(_changes(records, 1 + place) for place in places)
            and all(_uniform(records, level) for level in levels)
        ):
            found.append(places)
    if len(found) != 1:
        raise ForeignFileError(f"{total} input blocks divide into levels in {len(found)} ways")
    return found[0]


def _changes(records: Mapping[str, Any], stage: int) -> bool:
    """A block that changes the number of channels or has attention does not change the resolution."""
    return f"input_blocks.{stage}.0.skip_connection.weight" in records or _has_attention(records, stage)


def _uniform(records: Mapping[str, Any], level: range) -> bool:
    kinds = {
        (size_of(records, f"input_blocks.{1 + index}.0.out_layers.0.weight", 0), _has_attention(records, 1 + index))
        for index in level
    }
    return len(kinds) == 1


def _has_attention(records: Mapping[str, Any], stage: int) -> bool:
    return any(f"input_blocks.{stage}.1.{name}.weight" in records for name in ("qkv", "proj_in"))


def _depth(records: Mapping[str, Any], place: str) -> int:
    """Transformer blocks of a block's attention."""
    return len({name.partition(".")[0] for name in with_prefix(records, f"{place}.1.transformer_blocks.")})


def _ratio(width: int, base: int) -> float:
    ratio = width / base
    return int(ratio) if ratio == int(ratio) else ratio
