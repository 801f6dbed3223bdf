"""Features of many images, streamed: each process takes a part, and statistics are merged at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import diffdistill.distributed as distributed
from diffdistill.metrics.features import Features
from diffdistill.metrics.frechet import FeatureStatistics


class Source(Protocol):
    """Images in a fixed order: stored ones, or those that a model draws.

    Attributes:
        shape: of one image.
        mixed: whether classes take turns, so that consecutive parts are alike. Folders and archives may be sorted.
        names: of the images, where they have any.
    """

    shape: tuple[int, ...]
    mixed: bool
    names: Sequence[str] | None

    def __len__(self) -> int: ...

    def batches(self, indices: range, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images `[<= batch_size, C, H, W]` and labels `[<= batch_size]`, or None, of consecutive indices."""
        ...


@dataclass(frozen=True)
class Keep:
    """What is kept beside mean and covariance, for the measures that need it.

    Attributes:
        features: all features, `[N, D]` in float32.
        logits: all logits, `[N, K]`.
    """

    features: bool = False
    logits: bool = False


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics and features of N images, the same in every process.

    Attributes:
        parts: statistics of `splits` parts of the images.
        part_of: the part that each image belongs to, long `[N]`.
        shape: of one image.
        features: `[N, D]`, or None if not kept.
        logits: `[N, K]`, or None.
        labels: long `[N]`, or None.
    """

    parts: tuple[FeatureStatistics, ...]
    part_of: Tensor
    shape: tuple[int, ...]
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None

    @property
    def statistics(self) -> FeatureStatistics:
        """Of all images."""
        return merged(self.parts)

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    def part(self, k: int) -> Collected:
        """Part `k` alone."""
        chosen = self.part_of == k
        rows = [None if v is None else v[chosen] for v in (self.features, self.logits, self.labels)]
        return Collected((self.parts[k],), self.part_of[chosen], self.shape, *rows)


def merged(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all parts together."""
    whole = FeatureStatistics()
    for part in parts:
        whole.merge(part)
    return whole


def shard(total: int) -> range:
    """The indices that fall to this process: consecutive, and equal in number but for one."""
    rank, world = distributed.rank(), distributed.world_size()
    return range(rank * total // world, (rank + 1) * total // world)


def parts_of(source: Source, splits: int) -> Tensor:
    """The part of `splits` that each image belongs to, long `[N]`: consecutive ones, or dealt out at random."""
    total = len(source)
    consecutive = torch.arange(total) * splits // total
    return consecutive if source.mixed else consecutive[torch.from_numpy(np.random.RandomState(0).permutation(total))]


@torch.no_grad()
def collect(
    source: Source,
    features: Features,
    *,
    keep: Keep | None = None,
    splits: int = 1,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Collected:
    """Run all images of a source through a feature extractor. Images are clipped to [-1, 1] first.

    Args:
        source: the images; each process takes its `shard` of them.
        features: the extractor.
        keep: what to keep beside mean and covariance.
        splits: number of parts whose statistics are kept apart, see `parts_of`.
        batch_size: images at a time.
        device: where to compute.

    Raises:
        ValueError: more parts than images, or features that are not finite.
    """
    keep, total = keep or Keep(), len(source)
    if not 1 <= splits <= total:
        raise ValueError(f"splits={splits} is outside 1 to {total}, the number of images")
    parts, part_of = [FeatureStatistics() for _ in range(splits)], parts_of(source, splits)
    kept: dict[str, list[Tensor]] = {"features": [], "logits": [], "labels": []}
    indices = shard(total)
    start = indices.start
    for x, labels in source.batches(indices, batch_size, torch.device(device)):
        values, logits = features.both(x.float().clamp(-1, 1))
        belongs = part_of[start : start + len(x)]
        for k in belongs.unique().tolist():
            parts[k].update(values[(belongs == k).to(values.device)])
        for name, rows in (
            ("features", values if keep.features else None),
            ("logits", logits if keep.logits else None),
            ("labels", labels),
        ):
            if rows is not None:
                kept[name].append(rows.cpu() if name == "labels" else rows.float().cpu())
        start += len(x)
    everyone = distributed.gather(([part.cpu() for part in parts], kept))
    rows = {name: [row for _, other in everyone for row in other[name]] for name in kept}
    return Collected(
        tuple(merged([theirs[k] for theirs, _ in everyone]) for k in range(splits)),
        part_of,
        tuple(source.shape),
        **{name: torch.cat(values) if values else None for name, values in rows.items()},
    )
