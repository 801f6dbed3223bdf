"""Features of many images, streamed: each process takes a part, and statistics are merged at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffdistill.evaluation.features import Features
from diffdistill.evaluation.frechet import FeatureStatistics
from diffdistill.training import distributed


class Source(Protocol):
    """Images in a fixed order: stored ones, or those that a model draws."""

    shape: tuple[int, ...]

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
    """What was seen of N images, in every process.

    Attributes:
        parts: statistics of `splits` consecutive parts of the images.
        shape: of one image.
        features: `[N, D]`, or None if not kept.
        logits: `[N, K]`, or None.
        labels: long `[N]`, or None.
    """

    parts: tuple[FeatureStatistics, ...]
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
        start = sum(part.count for part in self.parts[:k])
        chosen = slice(start, start + self.parts[k].count)
        rows = [None if v is None else v[chosen] for v in (self.features, self.logits, self.labels)]
        return Collected((self.parts[k],), self.shape, *rows)


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
        splits: number of consecutive parts whose statistics are kept apart.
        batch_size: images at a time.
        device: where to compute.

    Raises:
        ValueError: more parts than images, or features that are not finite.
    """
    keep, total = keep or Keep(), len(source)
    if not 1 <= splits <= total:
        raise ValueError(f"splits={splits} is outside 1 to {total}, the number of images")
    parts = [FeatureStatistics() for _ in range(splits)]
    kept: dict[str, list[Tensor]] = {"features": [], "logits": [], "labels": []}
    indices = shard(total)
    start = indices.start
    for x, labels in source.batches(indices, batch_size, torch.device(device)):
        values, logits = features.both(x.float().clamp(-1, 1))
        part_of = torch.arange(start, start + len(x)) * splits // total
        for k in part_of.unique().tolist():
            parts[k].update(values[(part_of == k).to(values.device)])
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
        tuple(source.shape),
        **{name: torch.cat(values) if values else None for name, values in rows.items()},
    )
