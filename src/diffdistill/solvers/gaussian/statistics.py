"""Data seen as a Gaussian, for each class: its denoiser and its probability flow in closed form.

At high noise a trained denoiser is close to that of a Gaussian with the data's mean and covariance (Wang and Vastola
2023, The Hidden Linear Structure in Score-Based Models).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.denoiser import NULL_LABEL, per_sample
from diffdistill.files.records import FileKind
from diffdistill.registry import choose
from diffdistill.solvers.gaussian.covariances import FORMS, Covariance, Rows, take

STATISTICS = FileKind("Gaussian statistics", key="diffdistill_gaussian", folder="statistics")
ALL = NULL_LABEL
"""The row of all data is the last one, which is where the null label points."""


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Means and covariances of each class and, last, of all data.

    Attributes:
        mean: float64 `[K + 1, ...]`; K = 0 without classes.
        covariance: K + 1 of them, in one of the `FORMS`.
        provenance: what they were computed from.
    """

    mean: Tensor
    covariance: Covariance
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        y: Tensor | None = None,
        *,
        num_classes: int = 0,
        form: Literal["full", "low_rank", "fourier"] = "full",
        rank: int | None = None,
    ) -> GaussianStatistics:
        """Mean and unbiased covariance of samples `x: [N, ...]`, of each class in the labels `y: [N]` and of all.

        Args:
            x: the samples.
            y: their labels, for statistics per class.
            num_classes: number of classes, 0 to use no labels.
            form: "full" for up to a few hundred dimensions; "low_rank" keeps `rank` principal components, and of the
                rest its diagonal; "fourier" is for large images, whose covariance it takes to be stationary.
            rank: for "low_rank".

        Raises:
            ValueError: an unknown form, a rank out of range, values that are not finite, a class of fewer than two.
        """
        choose("form of a covariance", form, FORMS)
        if (form == "low_rank") != (rank is not None):
            raise ValueError(f"a rank belongs to the form low_rank, and is needed for it: form {form!r}, rank {rank}")
        x = x.detach().to(torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the samples {list(x.shape)} hold values that are not finite")
        if num_classes and (y is None or y.shape != x.shape[:1]):
            raise ValueError(f"{num_classes} classes need labels [{len(x)}], one for each sample")
        groups = [x[y == label] for label in range(num_classes)] if y is not None else []
        groups.append(x)
        for label, group in enumerate(groups):
            if len(group) < 2:
                raise ValueError(f"a covariance needs at least 2 samples, but class {label} has {len(group)}")
        means = [group.mean(0) for group in groups]
        centred = [group - mean for group, mean in zip(groups, means, strict=True)]
        return cls(torch.stack(means), FORMS[form].fit(centred, rank))

    @property
    def num_classes(self) -> int:
        return len(self.mean) - 1

    @property
    def data_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape[1:])

    def to(self, device: torch.device | str) -> GaussianStatistics:
        """The same on another device."""
        return GaussianStatistics(self.mean.to(device), self.covariance.to(device), self.provenance)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Any = None, w: float | Tensor = 0.0) -> Tensor:
        """The denoiser of the Gaussian, `mu + C (C + sigma^2)^-1 (x - mu)`, guided by w as in Meng et al. 2023.

        Args:
            x: `[B, ...]`.
            sigma: `[B]`, positive.
            cond: class labels `[B]`; None, -1, or a condition that is no label stand for all data.
            w: guidance weight, a float or `[B]`.
        """
        y, variance, rows = self._state(x), sigma.to(torch.float64) ** 2, self._rows(cond, x)

        def denoised(rows: Rows) -> Tensor:
            mean = take(self.mean, rows)
            return mean + self.covariance.shrink(y - mean, rows, variance)

        result = denoised(rows)
        if isinstance(w, Tensor) or w:
            weight = per_sample(w, y) if isinstance(w, Tensor) else w
            result = result + weight * (result - denoised(ALL))
        return result.to(x.dtype)

    def carry(self, x: Tensor, sigma: float, sigma_next: float, cond: Any = None) -> Tensor:
        """The unguided probability flow from `sigma` down to `sigma_next`, exact for the Gaussian.

        `x(s) = mu + ((C + s^2) (C + S^2)^-1)^(1/2) (x(S) - mu)`; arguments as in `denoise`.
        """
        y, rows = self._state(x), self._rows(cond, x)
        mean = take(self.mean, rows)
        return (mean + self.covariance.contract(y - mean, rows, sigma**2, sigma_next**2)).to(x.dtype)

    def _state(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.data_shape:
            raise ValueError(f"these statistics are of data {list(self.data_shape)}, not {list(x.shape[1:])}")
        return x.to(torch.float64)

    def _rows(self, cond: Any, x: Tensor) -> Rows:
        """Row of each sample."""
        if self.num_classes and isinstance(cond, Tensor) and cond.shape == (len(x),) and not cond.is_floating_point():
            return cond.to(x.device)
        return ALL


def save_gaussian(statistics: GaussianStatistics, path: str | os.PathLike[str]) -> None:
    """Write statistics to one .safetensors file, whole or not at all."""
    form = next(name for name, kind in FORMS.items() if isinstance(statistics.covariance, kind))
    record = {"form": form, "provenance": dict(statistics.provenance)}
    STATISTICS.write(path, record, {"mean": statistics.mean, **statistics.covariance.tensors()})


def load_gaussian(name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> GaussianStatistics:
    """Load statistics.

    Args:
        name_or_path: the name of a shipped model (`shipped_gaussians()` lists those that have statistics), or a file
            that `save_gaussian` wrote.
        device: where to put them.

    Raises:
        ValueError: there is no such file, or it is damaged, of another version, or holds no statistics.
    """
    path = STATISTICS.find(name_or_path)
    record, tensors = STATISTICS.read(path)
    try:
        form, provenance = choose("form of a covariance", record["form"], FORMS), record["provenance"]
        statistics = GaussianStatistics(tensors.pop("mean"), form(**tensors), provenance)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record in {path} makes no Gaussian statistics: {error}") from None
    return statistics.to(device)


def shipped_gaussians() -> dict[str, Path]:
    """The statistics that come with the package, by the name of their model."""
    return STATISTICS.shipped()
