"""Weights `omega(sigma)` of a squared error on x0, and that error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.registry import construct


def make_weighting(name: str, *, sigma_data: float = 0.5) -> Callable[[Tensor], Tensor]:
    """The weight `omega(sigma)` of a squared error on x0, with `SNR = 1 / sigma**2`.

    "truncated_snr": `max(SNR, 1)`, and "snr_plus_one": `SNR + 1`, the v loss (Salimans and Ho 2022, Section 4);
    "edm": `1 / sigma**2 + 1 / sigma_data**2` (Karras et al. 2022, Table 1); "uniform": 1.
    """
    return construct("weighting", name, WEIGHTINGS, sigma_data)


WEIGHTINGS: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
    "truncated_snr": lambda sigma_data: lambda sigma: (sigma**-2).clamp(min=1),
    "snr_plus_one": lambda sigma_data: lambda sigma: sigma**-2 + 1,
    "edm": lambda sigma_data: lambda sigma: sigma**-2 + sigma_data**-2,
    "uniform": lambda sigma_data: torch.ones_like,
}


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of `weight [B]` times the mean squared error of each sample."""
    error = (prediction - target).square().flatten(1).mean(1)
    return (weight.to(error.dtype) * error).mean()


def pseudo_huber(prediction: Tensor, target: Tensor, weight: Tensor, *, c: float = 5.4e-4) -> Tensor:
    """`sqrt(e + c**2) - c` of the error e that `weighted_error` takes the mean of (Song and Dhariwal 2024, Eq. 8).

    Their c is 0.00054 times the root of the number of pixels, over which the error here is the mean.
    """
    error = (prediction - target).square().flatten(1).mean(1)
    return ((weight.to(error.dtype) * error + c**2).sqrt() - c).mean()


ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"squared": weighted_error, "huber": pseudo_huber}
