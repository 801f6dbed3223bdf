"""Reference statistics: what samples are compared with, as files of EDM, EDM2, ADM and ours, or computed from data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.files.archives import open_npz
from diffdistill.files.remote import local_path
from diffdistill.metrics.collect import Collected
from diffdistill.metrics.features import Features
from diffdistill.metrics.frechet import Gaussian, load_statistics, save_statistics

EDM2_KEYS = {"inception": "fid", "dinov2": "fd_dinov2"}
"""Where a file of EDM2 keeps the statistics of a feature extractor."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images.

    Attributes:
        gaussian: mean and covariance of their features.
        extractor: name of the feature extractor, or None where the file does not say.
        weights: hash of its weights, or None.
        shape: of one image, or None.
        features: all features `[N, D]`, which kernel and neighbour measures need, or None.
    """

    gaussian: Gaussian
    extractor: str | None = None
    weights: str | None = None
    shape: tuple[int, ...] | None = None
    features: Tensor | None = None

    def check(self, features: Features, collected: Collected) -> None:
        """Refuse samples whose features or resolution are not the reference's.

        Raises:
            ValueError: another extractor, other weights, another number of features, or another image shape.
        """
        if self.extractor not in (None, features.name):
            raise ValueError(f"the reference holds features of {self.extractor}, the samples of {features.name}")
        if self.weights is not None and features.weights is not None and self.weights != features.weights:
            raise ValueError(
                f"the reference was made with other weights of {features.name}: "
                f"{self.weights[:16]} instead of {features.weights[:16]}"
            )
        if self.shape is not None and tuple(self.shape) != tuple(collected.shape):
            raise ValueError(f"the reference is of images {list(self.shape)}, the samples are {list(collected.shape)}")
        size = len(collected.statistics.mean)
        if len(self.gaussian.mean) != size:
            raise ValueError(
                f"the reference has {len(self.gaussian.mean)} features, {features.name} has {size}: "
                "it was made with another extractor"
            )


def reference_of(collected: Collected, features: Features) -> Reference:
    """The reference that these images make."""
    gaussian = collected.statistics.gaussian()
    return Reference(gaussian, features.name, features.weights, collected.shape, collected.features)


def save_reference(reference: Reference, path: str | os.PathLike[str]) -> None:
    """Write a reference to an .npz that EDM's tools read too."""
    save_statistics(
        reference.gaussian,
        path,
        features=reference.extractor or "unknown",
        weights=reference.weights,
        shape=reference.shape,
        rows=None if reference.features is None else reference.features.float().numpy(),
    )


def load_reference(path: str | os.PathLike[str], *, extractor: str) -> Reference:
    """Read the reference for one feature extractor.

    Args:
        path: an `.npz` of EDM, ADM or ours, or a `.pkl` of EDM2, which is read as data: nothing in it is executed. A
            hub id or a URL is fetched.
        extractor: name of the feature extractor; files of EDM2 hold several.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds no statistics of this extractor.
    """
    path = local_path(path)
    if path.suffix != ".pkl":
        gaussian = load_statistics(path)
        with open_npz(path, what="reference statistics") as file:
            held: dict[str, Any] = {n: file[n] for n in ("features", "weights", "shape", "rows") if n in file.files}
        name = str(held["features"]) if "features" in held else None
        return Reference(
            gaussian,
            None if name == "unknown" else name,
            str(held["weights"]) if "weights" in held else None,
            tuple(int(n) for n in held["shape"]) if "shape" in held else None,
            torch.from_numpy(held["rows"]) if "rows" in held else None,
        )
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {str(path)!r}")
    from diffdistill.interop import read_arrays

    arrays = read_arrays(path)
    key = EDM2_KEYS.get(extractor, extractor)
    found = arrays.get(key, arrays if "mu" in arrays else None)
    if not isinstance(found, Mapping) or "mu" not in found or "sigma" not in found:
        raise ValueError(f"{str(path)!r} has no statistics of {extractor}: it holds {', '.join(arrays) or 'nothing'}")
    mean, covariance = (torch.as_tensor(np.asarray(found[name], dtype=np.float64)) for name in ("mu", "sigma"))
    return Reference(Gaussian(mean, covariance), extractor)
