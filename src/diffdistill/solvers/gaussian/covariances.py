"""Covariances in the forms that images allow: full, low-rank plus diagonal, or diagonal in Fourier space.

Each holds K covariances of one form, one for each class; `rows` says which one belongs to which sample, `[B]`, or is
one integer for all. Vectors have the shape of the data, `[B, ...]`, in float64; noise variances are `[B]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample

Rows = Tensor | int


def take(stack: Tensor, rows: Rows) -> Tensor:
    """The chosen rows, `[B, ...]`, or `[1, ...]` for one integer, so that nothing is copied."""
    return stack[rows] if isinstance(rows, Tensor) else stack[rows].unsqueeze(0)


@dataclass(frozen=True, eq=False)
class Covariance(ABC):
    """K covariances C of the same form."""

    @abstractmethod
    def shrink(self, v: Tensor, rows: Rows, variance: Tensor) -> Tensor:
        """`C (C + variance I)^-1 v`: the Wiener filter for noise of this variance, which must be positive."""

    @abstractmethod
    def contract(self, v: Tensor, rows: Rows, variance: float, variance_next: float) -> Tensor:
        """`((C + variance_next I) (C + variance I)^-1)^(1/2) v`, for `0 < variance_next <= variance`."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by the names of the constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Covariance:
        """The same on another device."""
        return type(self)(**{name: value.to(device) for name, value in self.tensors().items()})


class Spectral(Covariance):
    """A covariance whose eigenvalues and eigenvectors are at hand."""

    @abstractmethod
    def apply(self, v: Tensor, rows: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`f(C) v`; `function` maps eigenvalues, `[B or 1, ...]`, one by one."""

    def shrink(self, v: Tensor, rows: Rows, variance: Tensor) -> Tensor:
        def filtered(values: Tensor) -> Tensor:
            values = values.expand(len(v), *values.shape[1:])
            return values / (values + per_sample(variance, values))

        return self.apply(v, rows, filtered)

    def contract(self, v: Tensor, rows: Rows, variance: float, variance_next: float) -> Tensor:
        return self.apply(v, rows, lambda values: ((values + variance_next) / (values + variance)).sqrt())


@dataclass(frozen=True, eq=False)
class FullCovariance(Spectral):
    """Eigenvalues `[K, D]` and eigenvectors `[K, D, D]`, in columns: for data of a few hundred dimensions."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def fit(cls, groups: Sequence[Tensor], rank: int | None = None) -> FullCovariance:
        """Of centred samples `[N, ...]`, one tensor for each covariance."""
        pairs = [torch.linalg.eigh(_covariance(group.flatten(1))) for group in groups]
        values, vectors = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return cls(values.clamp(min=0), vectors)

    def apply(self, v: Tensor, rows: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
        vectors = take(self.vectors, rows)
        coordinates = torch.einsum("bde,bd->be", vectors, v.flatten(1))
        return torch.einsum("bde,be->bd", vectors, function(take(self.values, rows)) * coordinates).view_as(v)


@dataclass(frozen=True, eq=False)
class FourierCovariance(Spectral):
    """Stationary images: eigenvalues `[K, C, H, W // 2 + 1]` at each frequency, after a rotation of the channels.

    The rotations `[K, C, C]` hold the principal directions of the channels in columns.
    """

    spectrum: Tensor
    channels: Tensor

    @classmethod
    def fit(cls, groups: Sequence[Tensor], rank: int | None = None) -> FourierCovariance:
        """Of centred images `[N, C, H, W]`, one tensor for each covariance."""
        spectra, rotations = [], []
        for group in groups:
            if group.ndim != 4:
                raise ValueError(f"the form fourier needs images [N, C, H, W], not {list(group.shape)}")
            rotation = torch.linalg.eigh(_covariance(group.movedim(1, -1).flatten(0, -2)))[1]
            frequencies = torch.fft.rfft2(torch.einsum("nchw,cd->ndhw", group, rotation), norm="ortho")
            spectra.append(frequencies.abs().square().sum(0) / (len(group) - 1))
            rotations.append(rotation)
        return cls(torch.stack(spectra), torch.stack(rotations))

    def apply(self, v: Tensor, rows: Rows, function: Callable[[Tensor], Tensor]) -> Tensor:
        channels = take(self.channels, rows)
        frequencies = torch.fft.rfft2(torch.einsum("bchw,bcd->bdhw", v, channels), norm="ortho")
        image = torch.fft.irfft2(function(take(self.spectrum, rows)) * frequencies, s=v.shape[-2:], norm="ortho")
        return torch.einsum("bdhw,bcd->bchw", image, channels)


NODES = 10
"""Nodes of the quadrature on one leg; a leg on which the variance at most halves is then exact to 1e-14."""


@dataclass(frozen=True, eq=False)
class LowRankCovariance(Covariance):
    """`F F^T + diag(d)` with factors F `[K, D, R]` and diagonal d `[K, D]`; nothing larger is ever formed."""

    factors: Tensor
    diagonal: Tensor

    @classmethod
    def fit(cls, groups: Sequence[Tensor], rank: int | None = None) -> LowRankCovariance:
        """The `rank` first principal components; the diagonal holds what they leave of each variance."""
        factors, diagonals = [], []
        for group in groups:
            v = group.flatten(1)
            most = min(v.shape)
            if rank is None or not 1 <= rank <= most:
                raise ValueError(f"rank must be 1 to {most} for {len(v)} samples of {v.shape[1]} numbers, not {rank}")
            _, singular, directions = torch.linalg.svd(v / math.sqrt(len(v) - 1), full_matrices=False)
            factors.append(directions[:rank].T * singular[:rank])
            rest = v.square().sum(0) / (len(v) - 1) - factors[-1].square().sum(1)
            diagonals.append(rest.clamp(min=0))
        return cls(torch.stack(factors), torch.stack(diagonals))

    def _solve(self, v: Tensor, factors: Tensor, diagonal: Tensor) -> Tensor:
        """`(F F^T + diag(diagonal))^-1 v` (Woodbury), for `v: [B, D]` and a positive diagonal."""
        inverse = 1 / diagonal
        inner = torch.einsum("bdr,bd,bds->brs", factors, inverse, factors) + torch.eye(factors.shape[2]).to(v)
        right = torch.einsum("bdr,bd->br", factors, inverse * v)
        # Not cholesky: that waits for the device to learn whether it succeeded.
        weights = torch.linalg.solve_ex(inner, right.unsqueeze(2))[0].squeeze(2)
        return inverse * (v - torch.einsum("bdr,br->bd", factors, weights))

    def shrink(self, v: Tensor, rows: Rows, variance: Tensor) -> Tensor:
        flat, factors = v.flatten(1), take(self.factors, rows)
        solved = self._solve(flat, factors, take(self.diagonal, rows) + variance[:, None])
        return (flat - variance[:, None] * solved).view_as(v)

    def contract(self, v: Tensor, rows: Rows, variance: float, variance_next: float) -> Tensor:
        """By quadrature, on legs that each at most halve the variance.

        With a = variance_next, b = variance, `sqrt((l + a) / (l + b))` is 1 minus 1/pi times the integral from a to b
        of `sqrt((t - a) / (b - t)) / (l + t)`, so that `f(C) v` is v minus a sum of `(C + t)^-1 v` over the nodes t of
        the Chebyshev weight of the third kind. It converges like `(3 + sqrt 8)^(-2 NODES)` where b <= 2 a.
        """
        flat, factors, diagonal = v.flatten(1), take(self.factors, rows), take(self.diagonal, rows)
        legs = max(1, math.ceil(math.log2(variance / variance_next)))
        ratio = (variance_next / variance) ** (1 / legs)
        for leg in range(legs):
            high = variance * ratio**leg
            low = high * ratio
            total = flat
            for k in range(1, NODES + 1):
                place = 1 + math.cos((2 * k - 1) * math.pi / (2 * NODES + 1))
                half = (high - low) / 2
                solved = self._solve(flat, factors, diagonal + (low + half * place))
                total = total - half * place * 2 / (2 * NODES + 1) * solved
            flat = total
        return flat.view_as(v)


def _covariance(v: Tensor) -> Tensor:
    """`[D, D]` of centred rows `[N, D]`."""
    return v.T @ v / (len(v) - 1)


FORMS: dict[str, type[FullCovariance] | type[LowRankCovariance] | type[FourierCovariance]] = {
    "full": FullCovariance,
    "low_rank": LowRankCovariance,
    "fourier": FourierCovariance,
}
