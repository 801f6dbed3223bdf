"""What the U-Nets are made of. Parameter names and initialisation are those of the public EDM checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Init:
    """A distribution to draw parameters from, and what to multiply the drawn weights and biases by."""

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"] = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draw `weight: [out, in, ...]` and `bias: [out]`; both take their spread from the fans of the weight."""
        size = weight[0, 0].numel()
        fan_out, fan_in = weight.shape[0] * size, weight.shape[1] * size
        for parameter, gain in ((weight, self.weight), (bias, self.bias)):
            if parameter is None:
                continue
            if self.mode == "kaiming_normal":
                parameter.normal_(0, gain * fan_in**-0.5)
            else:
                bound = math.sqrt(6 / (fan_in + fan_out) if self.mode == "xavier_uniform" else 3 / fan_in)
                parameter.uniform_(-gain * bound, gain * bound)


def linear(in_features: int, out_features: int, init: Init, *, bias: bool = True) -> nn.Linear:
    """A fully connected layer with parameters drawn by `init`."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    init.fill(layer.weight, layer.bias)
    return layer


MANY = 2**20
"""Numbers from which traffic of memory costs a GPU more than launching a few small kernels."""


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 or finer, by default with up to 32 groups of at least 4 channels."""

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(min(32, channels // 4) if groups is None else groups, channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype.itemsize >= 4:
            return super().forward(input)
        large = input.is_cuda and input.numel() >= MANY and not torch.is_grad_enabled()
        if large and not torch.compiler.is_compiling():
            return self.by_channel(input)
        # Exact sums, and three times faster than torch's own bf16 kernel for channels_last on a CPU.
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)

    def by_channel(self, input: Tensor) -> Tensor:
        """The same without gradients, with a quarter of the memory traffic on a GPU: `[B, C, ...]` in half precision.

        Sums and coefficients are float32, but the input is read and the result written as it lies. PyTorch's kernel
        for CUDA wants channels first, hence copies, and under autocast float32.
        """
        pixels, ones = tuple(range(2, input.ndim)), (1,) * (input.ndim - 2)
        per_group = input[0].numel() // self.num_groups
        with torch.autocast(input.device.type, enabled=False):
            mean = input.mean(pixels, dtype=torch.float32).unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True)
            norm = torch.linalg.vector_norm(input, dim=pixels, dtype=torch.float32).unflatten(1, (self.num_groups, -1))
            square = norm.square().sum(2, keepdim=True) / per_group
            inverse = (torch.addcmul(square, mean, mean, value=-1).clamp(min=0) + self.eps).rsqrt()
            scale = inverse * self.weight.float().view(self.num_groups, -1)
            shift = torch.addcmul(self.bias.float().view(self.num_groups, -1), mean, scale, value=-1)
            scale, shift = (part.flatten(1).unflatten(1, (-1, *ones)) for part in (scale, shift))
            return torch.addcmul(shift, input, scale, out=torch.empty_like(input))


def upsample(x: Tensor) -> Tensor:
    """Double height and width by repetition, in the dtype of `x`: autocast on a GPU would go by way of float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Conv2d(nn.Module):
    """A convolution that keeps the size, with an optional resampling by two.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel: 1 or 3; 0 resamples only.
        init: how to draw the parameters.
        resample: "up" or "down" by two, before the convolution.
        resample_filter: one-dimensional low-pass filter, applied along both axes.
        filter_last: convolve at the full size, then resample down; NCSN++ does so in its encoder's residual path.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init | None = None,
        *,
        resample: Literal["up", "down"] | None = None,
        resample_filter: Sequence[float] = (1, 1),
        filter_last: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.padding = kernel // 2
        self.resample = resample
        self.filter_last = filter_last
        self.is_box = list(resample_filter) == [1, 1]
        self.filter_padding = (len(resample_filter) - 1) // 2 if resample else 0
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            (init or Init()).fill(self.weight, self.bias)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter_last:
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + self.filter_padding)
            return self._downsample(x, padding=0)
        if self.resample == "up":
            x = self._upsample(x)
        elif self.resample == "down":
            x = self._downsample(x, padding=self.filter_padding)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.is_box:
            return upsample(x)
        # Three of four inputs of the filter are the zeros between the pixels: the factor 4 makes up for them.
        taps = (4 * self._taps(x)).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, taps, stride=2, padding=self.filter_padding, groups=x.shape[1])

    def _downsample(self, x: Tensor, *, padding: int) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, self._taps(x).expand(x.shape[1], -1, -1, -1), stride=2, padding=padding, groups=x.shape[1])

    def _taps(self, x: Tensor) -> Tensor:
        assert isinstance(self.resample_filter, Tensor)
        return self.resample_filter.to(x.dtype)


def for_fused_attention(qkv: Tensor) -> Tensor:
    """Queries, keys and values `[3, B, heads, L, C]` with their channels side by side, as the fused kernels want.

    For other layouts PyTorch falls back to a product that holds all `L * L` weights. That is the faster way to train
    on small images on a CPU, so there they stay as they are.
    """
    return qkv.contiguous() if qkv.is_cuda or not torch.is_grad_enabled() else qkv


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network have in common.

    Attributes:
        emb_channels: width of the embedding of noise level and labels.
        num_heads: heads of the attention, or None for one per 64 channels.
        dropout: probability of dropping an activation before the second convolution.
        skip_scale: multiplies every sum with a residual.
        eps: of the group normalisations.
        resample_filter: low-pass filter of up- and downsampling.
        resample_proj: convolve the residual where it is resampled, also if it keeps its channels.
        adaptive_scale: the embedding gives scale and shift after the second normalisation, or a bias before it.
        init, init_zero, init_attn: for layers in general, for the last of a residual branch, for the one of q, k and v.
    """

    emb_channels: int
    num_heads: int | None = None
    dropout: float = 0.0
    skip_scale: float = 1.0
    eps: float = 1e-5
    resample_filter: Sequence[float] = (1, 1)
    resample_proj: bool = False
    adaptive_scale: bool = True
    init: Init = field(default_factory=Init)
    init_zero: Init = field(default_factory=lambda: Init(weight=0))
    init_attn: Init = field(default_factory=Init)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention, as in DDPM++, NCSN++ and ADM."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.adaptive_scale = style.adaptive_scale
        self.skip_scale = style.skip_scale
        self.dropout = style.dropout
        # One head per 64 channels means no attention at all below 64 channels, as published.
        self.num_heads = (out_channels // 64 if style.num_heads is None else style.num_heads) if attention else 0

        how: dict[str, Any] = {"resample": resample, "resample_filter": style.resample_filter}
        self.norm0 = GroupNorm(in_channels, eps=style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, style.init, **how)
        self.affine = linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), style.init)
        self.norm1 = GroupNorm(out_channels, eps=style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)
        self.skip = None
        if in_channels != out_channels or resample:
            kernel = 1 if style.resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, style.init, **how)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=style.eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `x: [B, in_channels, H, W]` and `emb: [B, emb_channels]` to `[B, out_channels, H', W']`."""
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = self._join(h, x if self.skip is None else self.skip(x))
        return self._join(self.proj(self._attend(x)), x) if self.num_heads else x

    def _join(self, branch: Tensor, residual: Tensor) -> Tensor:
        total = branch + residual
        return total if self.skip_scale == 1 else total * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        # Channels are ordered (head, channel of the head, q k v).
        qkv = self.qkv(self.norm2(x)).reshape(x.shape[0], self.num_heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = for_fused_attention(qkv.permute(3, 0, 1, 4, 2))
        h = F.scaled_dot_product_attention(q, k, v)
        return h.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])


class SinusoidalEmbedding(nn.Module):
    """Cosines and sines of a number per sample, `[B] -> [B, num_channels]`, computed in float32 or finer.

    Args:
        freqs: angular frequencies over `scale`, `[num_channels / 2]`.
        scale: multiplies the frequencies.
        sin_first: order the result (sin, cos) in place of (cos, sin).
        persistent: keep the frequencies in the state, as is needed where they are random.
    """

    freqs: Tensor

    def __init__(self, freqs: Tensor, *, scale: float = 1.0, sin_first: bool = False, persistent: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.sin_first = sin_first
        self.register_buffer("freqs", freqs.float(), persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinusoidalEmbedding:
        # A half-precision network keeps its frequencies: a phase of some hundred radians has no digits left in bf16.
        def careful(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype.itemsize >= 4 else t.to(moved.device)

        return super()._apply(careful, recurse)

    def forward(self, values: Tensor) -> Tensor:
        phase = values.to(self.freqs.dtype)[:, None] * (self.scale * self.freqs)
        parts = (phase.sin(), phase.cos()) if self.sin_first else (phase.cos(), phase.sin())
        return torch.cat(parts, dim=1)


def positional_embedding(num_channels: int, *, endpoint: bool, sin_first: bool) -> SinusoidalEmbedding:
    """Frequencies from 1 down to 1 / 10000, the last included or not (DDPM++, ADM)."""
    half = num_channels // 2
    exponent = torch.arange(half, dtype=torch.float32) / (half - 1 if endpoint else half)
    return SinusoidalEmbedding((1 / 10000) ** exponent, sin_first=sin_first)


def fourier_embedding(num_channels: int) -> SinusoidalEmbedding:
    """Random normal frequencies of standard deviation 16 per cycle (NCSN++)."""
    freqs = 16 * torch.randn(num_channels // 2)
    return SinusoidalEmbedding(freqs, scale=2 * math.pi, sin_first=True, persistent=True)


def guidance_embedding(num_channels: int) -> SinusoidalEmbedding:
    """Embedding of a guidance weight in [0, 16]: periods from 64 down to 1, spaced evenly in their logarithm.

    The slowest wave grows over a quarter of its period, hence tells all weights of the range apart; the fastest
    resolves steps of about 0.1. Meng et al. 2023 embed w in Fourier features and do not state their frequencies.
    """
    period = torch.logspace(6, 0, num_channels // 2, base=2)
    return SinusoidalEmbedding(1 / period, scale=2 * math.pi)


def ratio_embedding(num_channels: int) -> SinusoidalEmbedding:
    """Embedding of a number in [0, 1], the end of a step over its beginning: periods from 4 down to 1/2.

    No faster wave, since flow maps are trained by derivatives through it (Lu and Song 2024, Section 4.1).
    """
    period = torch.logspace(2, -1, num_channels // 2, base=2)
    return SinusoidalEmbedding(1 / period, scale=2 * math.pi)


class AddedInputs(nn.Module):
    """What the U-Nets share: a guidance weight and the end of a step as inputs, added to what embeds the noise level.

    The layers that take them are linear, zero at first and have no bias: a fresh network ignores both.
    """

    def make_inputs(self, channels: int, *, w_channels: int, s_channels: int) -> None:
        """Build their layers.

        Args:
            channels: of the embedded noise level.
            w_channels: width of the embedding of a guidance weight, 0 for none.
            s_channels: width of the embedding of the end of a step, 0 for none.
        """
        self.w_channels, self.s_channels = w_channels, s_channels
        zero = Init("xavier_uniform", weight=0)
        self.embed_w = guidance_embedding(w_channels) if w_channels else None
        self.map_w = linear(w_channels, channels, zero, bias=False) if w_channels else None
        self.embed_s = ratio_embedding(s_channels) if s_channels else None
        self.map_s = linear(s_channels, channels, zero, bias=False) if s_channels else None

    def add_inputs(self, emb: Tensor, w: Tensor | None, ratio: Tensor | None) -> Tensor:
        """`emb: [B, channels]` with both inputs `[B]` added; None stands for w = 0, and for a ratio of 1.

        Raises:
            ValueError: an input that the network was not built with.
        """
        if self.embed_w is not None and self.map_w is not None:
            w = emb.new_zeros(len(emb)) if w is None else w
            emb = emb + self.map_w(self.embed_w(w).to(emb.dtype))
        elif w is not None:
            raise ValueError("this network takes no guidance weight: build it with w_channels > 0, or pass w=None")
        if self.embed_s is not None and self.map_s is not None:
            ratio = emb.new_ones(len(emb)) if ratio is None else ratio
            emb = emb + self.map_s(self.embed_s(ratio).to(emb.dtype))
        elif ratio is not None:
            raise ValueError("this network takes no end of a step: build it with s_channels > 0, or pass ratio=None")
        return emb
