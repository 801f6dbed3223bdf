"""Random numbers that depend on (seed, update, place in the batch) alone.

So a resumed run draws what the uninterrupted one drew, and a batch that is split into parts, for gradient accumulation
or over processes, draws what the whole batch would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_from(*words: int | str) -> int:
    """A 63-bit seed from a key such as `(seed, "noise", update)`; different keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchGenerator(torch.Generator):
    """The generator of samples `start` to `start + count` of a batch of `total` samples.

    `rand`, `randn` and `randint` below draw for the whole batch and return the rows of this part: the same numbers
    however the batch is split. Drawing rows that others use costs little beside a network. Where the generator is
    passed to torch's own functions, a part has a stream of its own, which is right but depends on the split.
    """

    def __new__(cls, device: torch.device | str, start: int, count: int, total: int) -> BatchGenerator:
        return super().__new__(cls, device)  # pyright: ignore[reportCallIssue]

    def __init__(self, device: torch.device | str, start: int, count: int, total: int) -> None:
        self.start, self.count, self.total = start, count, total
        self.shared = self if count == total else torch.Generator(device)

    def reseed(self, *words: int | str) -> BatchGenerator:
        """Start the streams that belong to a key; returns self."""
        self.manual_seed(seed_from(*words, self.start))
        if self.shared is not self:
            self.shared.manual_seed(seed_from(*words, 0))
        return self

    def rows(self, count: int) -> tuple[torch.Generator, int, slice]:
        """Which generator to draw how many rows from, and which of them to keep, to get `count` rows.

        Raises:
            ValueError: `count` is not the number of samples of this part.
        """
        if count != self.count:
            raise ValueError(f"draws have one row per sample: {self.count} rows in this part of the batch, not {count}")
        return self.shared, self.total, slice(self.start, self.start + count)


def _rows(count: int, generator: torch.Generator) -> tuple[torch.Generator, int, slice]:
    if isinstance(generator, BatchGenerator):
        return generator.rows(count)
    return generator, count, slice(None)


def rand(shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), `shape = [B, ...]`, on the generator's device."""
    source, total, keep = _rows(shape[0], generator)
    return torch.rand((total, *shape[1:]), generator=source, device=source.device, dtype=dtype)[keep]


def randn(shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, `shape = [B, ...]`, on the generator's device."""
    source, total, keep = _rows(shape[0], generator)
    return torch.randn((total, *shape[1:]), generator=source, device=source.device, dtype=dtype)[keep]


def randint(high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform integers in [0, high), long, `shape = [B, ...]`, on the generator's device."""
    source, total, keep = _rows(shape[0], generator)
    return torch.randint(high, (total, *shape[1:]), generator=source, device=source.device)[keep]


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise in the shape of `x`."""
    return randn(x.shape, generator, dtype=x.dtype)


def draw_w(w_range: tuple[float, float], batch: int, generator: torch.Generator) -> Tensor:
    """Guidance weights `[batch]`, uniform in `w_range`."""
    low, high = w_range
    return low + (high - low) * rand((batch,), generator)


def choice(count: int, generator: torch.Generator) -> int:
    """One integer in [0, count) for the whole batch, however it is split; it depends on the generator's seed alone."""
    source, _, _ = generator.rows(generator.count) if isinstance(generator, BatchGenerator) else _rows(1, generator)
    return seed_from(source.initial_seed(), "choice") % count
