"""Measures of nearest neighbours: precision, recall, density and coverage.

Precision and recall equal torch-fidelity's, which the tests compare; the neighbours serve all four measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024


@dataclass(frozen=True)
class Manifold:
    """How samples and real data cover each other.

    Attributes:
        precision: share of samples inside a ball of the real data.
        recall: share of real data inside a ball of the samples.
        density: balls of the real data around a sample, divided by k; may exceed 1.
        coverage: share of real data with a sample in its ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1 and 2).

    Args:
        samples: features `[M, D]`.
        real: features `[N, D]`.
        k: the ball of a point reaches to its k-th nearest neighbour of the same set, itself not counted.

    Raises:
        ValueError: different D, or not more than k points.
    """
    samples, real = _pair(samples, real, k)
    return _inside(samples, real, radii(real, k)), _inside(real, samples, radii(samples, k))


def density_coverage(samples: Tensor, real: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, Eq. 3 and 4); arguments as `precision_recall`."""
    samples, real = _pair(samples, real, k)
    radius = radii(real, k)
    balls = 0.0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for distances in _distances(samples, real):
        inside = distances <= radius
        balls += float(inside.sum())
        covered |= inside.any(dim=0)
    return balls / (k * len(samples)), float(covered.double().mean())


def compare_manifolds(samples: Tensor, real: Tensor, *, k: int = 3, k_coverage: int = 5) -> Manifold:
    """All four, with the papers' numbers of neighbours."""
    return Manifold(*precision_recall(samples, real, k=k), *density_coverage(samples, real, k=k_coverage))


def radii(points: Tensor, k: int) -> Tensor:
    """Distance `[N]` of each point `[N, D]` to its k-th nearest other point."""
    # The point itself is the nearest of all, hence k + 1.
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in _distances(points, points)])


def nearest(queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """For each query `[M, D]` the index of its nearest point `[N, D]`, long `[M]`, and the distance, float64 `[M]`."""
    queries, points = _pair(queries, points, 0)
    index = torch.cat([distances.argmin(dim=1) for distances in _distances(queries, points)])
    # Distances by matrix product lose digits near zero: the one that is reported is recomputed.
    gaps = [
        (part - points[at]).norm(dim=1) for part, at in zip(queries.split(_CHUNK), index.split(_CHUNK), strict=True)
    ]
    return index, torch.cat(gaps)


def _inside(queries: Tensor, centres: Tensor, radius: Tensor) -> float:
    hits = [(distances <= radius).any(dim=1) for distances in _distances(queries, centres)]
    return float(torch.cat(hits).double().mean())


def _distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    for part in queries.split(_CHUNK):
        yield torch.cdist(part, points)


def _pair(samples: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    samples, real = torch.as_tensor(samples).double(), torch.as_tensor(real).double()
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(f"expected [M, D] and [N, D], not {list(samples.shape)} and {list(real.shape)}")
    if min(len(samples), len(real)) <= k:
        raise ValueError(f"k={k} neighbours need more than {min(len(samples), len(real))} points")
    return samples, real.to(samples.device)
