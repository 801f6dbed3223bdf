"""Noise with one seed per sample, so that a seed gives the same image at any batch size (as in EDM's generate.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SampleNoise:
    """A stream of standard normal noise for each sample.

    Args:
        seeds: one integer per sample.
        shape: shape of one sample.

    Each stream lives on the CPU, so that all devices see the same numbers.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**63) for seed in seeds]

    def draw(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The next `[B, *shape]` of every stream. It is drawn in float32, so that all dtypes see the same numbers."""
        pinned = torch.device(device).type == "cuda"  # so that the copy waits for nothing
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=pinned)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(device=device, dtype=dtype, non_blocking=True)


def seeded_noise(
    seeds: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise `[len(seeds), *shape]` in which row i depends on `seeds[i]` alone."""
    return SampleNoise(seeds, shape).draw(dtype=dtype, device=device)
