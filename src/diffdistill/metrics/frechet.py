"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, Eq. 6), from eigenvalues."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffdistill.files.archives import open_npz
from diffdistill.files.atomic import replacing


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]` of features, in float64.

    Attributes:
        count: number of samples behind them, or None if unknown.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        size = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (size, size):
            raise ValueError(
                f"expected a mean [D] and a covariance [D, D], not {list(self.mean.shape)} "
                f"and {list(self.covariance.shape)}"
            )


class FeatureStatistics:
    """Mean and covariance of features that arrive in parts, in float64.

    Parts are merged by Chan, Golub and LeVeque (1979), Eq. 2.1: sums of squares are always about the mean, so nothing
    cancels, and shards that were counted apart merge to the same result as one pass.

    Attributes:
        count: samples seen so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor | np.ndarray) -> FeatureStatistics:
        """Take in features `[B, D]`; returns itself.

        Raises:
            ValueError: not a matrix, another D than before, or values that are not finite.
        """
        features = torch.as_tensor(features).detach().double()
        if features.ndim != 2:
            raise ValueError(f"features are [B, D], not {list(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"features {list(features.shape)} hold values that are not finite")
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._merge(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Take in what `other` has seen; returns itself. `other` stays as it is."""
        if other.count:
            self._merge(other.count, *other._moments())
        return self

    def cpu(self) -> FeatureStatistics:
        """The same statistics on the CPU, apart from these."""
        copy = FeatureStatistics()
        if self.count:
            copy._merge(self.count, *(part.cpu() for part in self._moments()))
        return copy

    @property
    def mean(self) -> Tensor:
        """`[D]`."""
        return self._moments()[0]

    @property
    def covariance(self) -> Tensor:
        """`[D, D]`, the unbiased estimate (divided by `count - 1`)."""
        scatter = self._moments()[1]
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The fitted Gaussian; warns if there are too few samples for a covariance of full rank."""
        covariance = self.covariance
        if self.count <= len(covariance):
            wanted = len(covariance) + 1
            warnings.warn(
                f"{self.count} samples leave the covariance of {len(covariance)} features singular: "
                f"take at least {wanted}",
                stacklevel=2,
            )
        return Gaussian(self.mean, covariance, self.count)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._scatter is None:
            raise ValueError("no features seen yet")
        return self._mean, self._scatter

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"expected {len(self._mean)} features per sample, not {len(mean)}")
        total = self.count + count
        gap = mean.to(self._mean.device) - self._mean
        self._scatter += scatter.to(gap.device) + torch.outer(gap, gap) * (self.count * count / total)
        self._mean += gap * (count / total)
        self.count = total


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, the squared 2-Wasserstein distance of two Gaussians.

    The trace of the root is the sum of the singular values of `C_a^(1/2) C_b^(1/2)` with symmetric roots, which
    exists and is real for singular covariances too (Dowson and Landau 1982).

    Raises:
        ValueError: different numbers of features, or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} features cannot be compared with those of {len(b.mean)}")
    if not bool(a.mean.isfinite().all()) or not bool(b.mean.isfinite().all()):
        raise ValueError(f"a mean [{len(a.mean)}] holds values that are not finite")
    mean_a, mean_b = a.mean.double(), b.mean.double().to(a.mean.device)
    cov_a, cov_b = a.covariance.double(), b.covariance.double().to(a.covariance.device)
    root = torch.linalg.svdvals(symmetric_root(cov_a) @ symmetric_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return max(float(distance), 0.0)  # rounding may leave the distance of equals just below zero


def symmetric_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix `[D, D]`; rounding below zero counts as zero."""
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError(f"a covariance {list(covariance.shape)} holds values that are not finite")
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def load_statistics(path: str | os.PathLike[str], *, spatial: bool = False) -> Gaussian:
    """Read reference statistics from an `.npz`, never unpickling.

    Files of EDM and ours hold `mu` and `sigma`; files of ADM also `mu_s` and `sigma_s` (spatial features).

    Args:
        path: the file.
        spatial: take ADM's spatial features (for sFID).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an `.npz`, or its arrays are missing, pickled, or do not match.
    """
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    arrays: dict[str, ArrayLike] = {}
    with open_npz(path, what="reference statistics") as file:
        missing = [name for name in names if name not in file.files]
        if missing:
            raise ValueError(f"{str(path)!r} has no {' or '.join(missing)}: it holds {', '.join(file.files)}")
        arrays = {name: file[name] for name in names}
        count = int(file["count"]) if "count" in file.files and not spatial else None
    mean, covariance = (torch.as_tensor(np.asarray(arrays[name], dtype=np.float64)) for name in names)
    return Gaussian(mean, covariance, count)


def save_statistics(
    statistics: Gaussian, path: str | os.PathLike[str], *, features: str, **more: ArrayLike | None
) -> None:
    """Write `mu`, `sigma`, `count` (where known) and the features' name to an `.npz` that EDM's tools read too.

    `more` are further arrays of the file; those that are None are left out.
    """
    arrays: dict[str, Any] = {
        "mu": statistics.mean.cpu().numpy(),
        "sigma": statistics.covariance.cpu().numpy(),
        "features": np.asarray(features),
        **{name: np.asarray(value) for name, value in more.items() if value is not None},
    }
    if statistics.count is not None:
        arrays["count"] = np.asarray(statistics.count)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
