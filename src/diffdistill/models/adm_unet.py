"""The U-Net of ADM by its published parameter names (Dhariwal and Nichol 2021), and of the models that took it over.

Consistency models (Song et al. 2023) and latent diffusion (Rombach et al. 2022) use it with other options.
`DhariwalUNet` is EDM's port of it, which differs in its parameter names, its attention heads and its initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.models.layers import AddedInputs, GroupNorm, for_fused_attention, positional_embedding, upsample
from diffdistill.models.transformer import SpatialTransformer, attend, zeroed

AttentionOrder = Literal["heads_first", "qkv_first"]
Resample = Literal["residual", "conv", "pool"]


@dataclass(frozen=True)
class ADMStyle:
    """What all blocks of one network have in common.

    Attributes:
        emb_channels: width of the embedding of noise level and label.
        dropout: probability of dropping an activation before the second convolution of a block.
        adaptive_scale: the embedding gives scale and shift after the second normalisation, or is added before it.
        resample: "residual" blocks, strided and ordinary "conv"olutions, or "pool"ing without parameters.
        head_channels: channels of an attention head.
        num_heads: attention heads, in place of `head_channels`.
        attention_order: order of the channels of q, k and v: (head, qkv, channel) or (qkv, head, channel).
        context_dim: width of the context of transformers in place of plain attention, 0 for none.
    """

    emb_channels: int
    dropout: float = 0.0
    adaptive_scale: bool = True
    resample: Resample = "residual"
    head_channels: int = 64
    num_heads: int | None = None
    attention_order: AttentionOrder = "heads_first"
    context_dim: int = 0

    def __post_init__(self) -> None:
        for option, value, valid in (
            ("resample", self.resample, ("residual", "conv", "pool")),
            ("attention_order", self.attention_order, ("heads_first", "qkv_first")),
        ):
            if value not in valid:
                raise ValueError(f"{option} {value!r} is unknown: choose one of {', '.join(valid)}")

    def heads(self, channels: int) -> int:
        """Attention heads over so many channels."""
        heads = self.num_heads or max(1, channels // self.head_channels)
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} attention heads")
        return heads

    def attention(self, channels: int) -> nn.Module:
        if self.context_dim:
            return SpatialTransformer(channels, num_heads=self.heads(channels), context_dim=self.context_dim)
        return AttentionBlock(channels, self.heads(channels), self.attention_order)


def normalization(channels: int) -> GroupNorm:
    """Group normalisation with 32 groups."""
    if channels % 32:
        raise ValueError(f"{channels} channels do not divide into 32 groups: channels must be a multiple of 32")
    return GroupNorm(channels, groups=32)


class ResBlock(nn.Module):
    """Residual block, with an optional resampling by two of both branches."""

    def __init__(
        self, channels: int, out_channels: int, style: ADMStyle, *, resample: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.adaptive_scale = style.adaptive_scale
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        emb_out = 2 * out_channels if style.adaptive_scale else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(style.emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(style.dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `x: [B, channels, H, W]` and `emb: [B, emb_channels]` to `[B, out_channels, H', W']`."""
        h = self.in_layers[2](self._resampled(self.in_layers[1](self.in_layers[0](x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self._resampled(x)) + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return upsample(x)
        return F.avg_pool2d(x, 2) if self.resample == "down" else x


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution, or by averaging."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution by repetition, with a convolution after it or not."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample(x))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of an image, with a residual."""

    def __init__(self, channels: int, num_heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.order: AttentionOrder = order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        h = self_attention(self.qkv(self.norm(flat)), self.num_heads, self.order)
        return (flat + self.proj_out(h)).view_as(x)


def self_attention(qkv: Tensor, num_heads: int, order: AttentionOrder) -> Tensor:
    """Attention of `qkv: [B, 3 C, L]` over its L positions: `[B, C, L]`."""
    batch, width, length = qkv.shape
    if order == "heads_first":
        parts = qkv.view(batch, num_heads, 3, width // 3 // num_heads, length).permute(2, 0, 1, 4, 3)
    else:
        parts = qkv.view(batch, 3, num_heads, width // 3 // num_heads, length).permute(1, 0, 2, 4, 3)
    q, k, v = for_fused_attention(parts)
    return attend(q, k, v).transpose(2, 3).reshape(batch, -1, length)


class Stage(nn.Sequential):
    """Layers in a row, some of which take the embedding, some the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:  # pyright: ignore
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class ADMShape:
    """The levels of a network: channels of each, blocks of each, and which have attention."""

    channels: tuple[int, ...]
    num_blocks: int
    attention: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        *,
        img_resolution: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> ADMShape:
        channels = tuple(round(mult * model_channels) for mult in channel_mult)
        attention = tuple(img_resolution >> level in attn_resolutions for level in range(len(channels)))
        return cls(channels, num_blocks, attention)


def encoder(img_channels: int, shape: ADMShape, style: ADMStyle) -> tuple[nn.ModuleList, list[int]]:
    """The stages from the image down to the lowest resolution, and the channels that each of them puts out."""
    channels = shape.channels[0]
    stages = nn.ModuleList([Stage(nn.Conv2d(img_channels, channels, 3, padding=1))])
    skips = [channels]
    for level, width in enumerate(shape.channels):
        for _ in range(shape.num_blocks):
            layers: list[nn.Module] = [ResBlock(channels, width, style)]
            channels = width
            if shape.attention[level]:
                layers.append(style.attention(channels))
            stages.append(Stage(*layers))
            skips.append(channels)
        if level < len(shape.channels) - 1:
            residual = style.resample == "residual"
            down = (
                ResBlock(channels, channels, style, resample="down")
                if residual
                else Downsample(channels, conv=style.resample == "conv")
            )
            stages.append(Stage(down))
            skips.append(channels)
    return stages, skips


def middle(channels: int, style: ADMStyle) -> Stage:
    """The stages at the lowest resolution."""
    return Stage(ResBlock(channels, channels, style), style.attention(channels), ResBlock(channels, channels, style))


def decoder(shape: ADMShape, skips: list[int], style: ADMStyle) -> nn.ModuleList:
    """The stages from the lowest resolution up to the image."""
    stages = nn.ModuleList()
    skips = list(skips)
    channels = skips[-1]
    for level in range(len(shape.channels) - 1, -1, -1):
        width = shape.channels[level]
        for i in range(shape.num_blocks + 1):
            layers: list[nn.Module] = [ResBlock(channels + skips.pop(), width, style)]
            channels = width
            if shape.attention[level]:
                layers.append(style.attention(channels))
            if level and i == shape.num_blocks:
                layers.append(
                    ResBlock(channels, channels, style, resample="up")
                    if style.resample == "residual"
                    else Upsample(channels, conv=style.resample == "conv")
                )
            stages.append(Stage(*layers))
    return stages


class OpenAIUNet(AddedInputs):
    """The U-Net of ADM, consistency models and latent diffusion; the defaults are those of ADM at ImageNet 256x256.

    Args:
        img_resolution: height and width of the images.
        img_channels: channels of the images.
        out_channels: channels of the output, if not `img_channels`; twice as many where the variance is predicted.
        label_dim: length of the one-hot class labels, 0 for none.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        s_channels: width of the embedding of the end of a step, of flow maps, 0 for none.
        model_channels: base number of channels.
        channel_mult: channels of each level over `model_channels`; every level halves the resolution.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with attention; the lowest has one more in any case.
        dropout, adaptive_scale, resample, head_channels, num_heads, attention_order, context_dim: as in `ADMStyle`.
            With `context_dim`, labels enter as the context of transformers in place of the embedding, and the last row
            of their table stands for no class (Rombach et al. 2022, Section 3.3).
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        out_channels: int | None = None,
        label_dim: int = 0,
        w_channels: int = 0,
        s_channels: int = 0,
        model_channels: int = 256,
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
        adaptive_scale: bool = True,
        resample: Resample = "residual",
        head_channels: int = 64,
        num_heads: int | None = None,
        attention_order: AttentionOrder = "heads_first",
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        emb_channels = 4 * model_channels
        style = ADMStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            adaptive_scale=adaptive_scale,
            resample=resample,
            head_channels=head_channels,
            num_heads=num_heads,
            attention_order=attention_order,
            context_dim=context_dim,
        )
        shape = ADMShape.of(
            img_resolution=img_resolution,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        self.map_noise = positional_embedding(model_channels, endpoint=False, sin_first=False)
        self.make_inputs(model_channels, w_channels=w_channels, s_channels=s_channels)
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = nn.Embedding(label_dim, emb_channels) if label_dim and not context_dim else None
        self.context_emb = nn.Embedding(label_dim + 1, context_dim) if label_dim and context_dim else None
        self.input_blocks, skips = encoder(img_channels, shape, style)
        self.middle_block = middle(skips[-1], style)
        self.output_blocks = decoder(shape, skips, style)
        channels = shape.channels[0]
        outputs = img_channels if out_channels is None else out_channels
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, outputs, 3, padding=1)))

    @property
    def bottleneck(self) -> nn.Module:
        """The blocks at the lowest resolution."""
        return self.middle_block

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        w: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: scaled image, `[B, img_channels, H, W]`.
            noise_labels: `c_noise`, `[B]`; a place in the table of noise levels for ADM and latent diffusion.
            class_labels: one-hot, `[B, label_dim]`; None or zeros for no class.
            w: guidance weight, `[B]`; None for zeros.
            ratio: end of the step over its beginning, `[B]` in [0, 1], of flow maps; None for 1.

        Returns:
            `[B, out_channels, H, W]`.
        """
        emb = self._embed(noise_labels, class_labels, w, ratio)
        context = self._context(class_labels, len(x))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, w: Tensor | None, ratio: Tensor | None
    ) -> Tensor:
        dtype = next(self.time_embed.parameters()).dtype
        # Out of autocast: the embedding costs next to nothing, and its digits tell noise levels apart.
        with torch.autocast(noise_labels.device.type, enabled=False):
            emb = self.map_noise(noise_labels).to(dtype)
            emb = self.add_inputs(emb, w, ratio)
            emb = self.time_embed(emb)
            if self.label_emb is not None and class_labels is not None:
                emb = emb + class_labels.to(dtype) @ self.label_emb.weight
        return emb

    def _context(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        if self.context_emb is None:
            return None
        table = self.context_emb.weight
        if class_labels is None:
            return table[-1].expand(batch, 1, -1)
        labels = class_labels.to(table.dtype)
        return (labels @ table[:-1] + (1 - labels.sum(1, keepdim=True)) * table[-1])[:, None]
