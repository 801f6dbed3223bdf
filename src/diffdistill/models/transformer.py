"""The transformer blocks of latent diffusion (Rombach et al. 2022, Section 3.3), by their published parameter names."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.models.layers import GroupNorm

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def zeroed(module: Module) -> Module:
    """The module with all its parameters set to zero: the last layer of a residual branch starts so."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `q: [B, heads, L, C]` to `k, v: [B, heads, M, C]`, scaled by `C ** -0.5`: `[B, heads, L, C]`."""
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Attention of a sequence to a context, or to itself."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map `x: [B, L, channels]` and `context: [B, M, context_dim]` to `[B, L, channels]`."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear layer, half of whose output gates the other half (Shazeer 2020)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with four times the channels between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published network has a dropout of probability 0 in the middle, which its parameter names count.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a feed-forward layer, each with a residual."""

    def __init__(self, channels: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """One transformer block over the positions of an image, with a residual around it."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups=32, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, num_heads)])
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Map `x: [B, channels, H, W]` and `context: [B, M, context_dim]` to the shape of x."""
        if context is None:
            raise ValueError("this network needs a context: build it with label_dim > 0")
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))
