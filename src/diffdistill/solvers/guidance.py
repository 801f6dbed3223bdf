"""Guidance weights as functions of the noise level: `sample(..., guidance=...)`. w is that of Meng et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from diffdistill.registry import construct

Weight = Callable[[float], float]


def guidance_interval(*, w: float, low: float = 0.0, high: float = math.inf) -> Weight:
    """The weight w at levels `low < sigma <= high`, and 0 elsewhere (Kynkäänniemi et al. 2024, Eq. 5).

    Raises:
        ValueError: ends that are not ordered.
    """
    if not 0 <= low < high:
        raise ValueError(f"an interval of guidance needs 0 <= low < high, but has {low} and {high}")
    return lambda sigma: w if low < sigma <= high else 0.0


def cfg_plus_plus(*, scale: float, sigmas: Sequence[float] | Tensor) -> Weight:
    """CFG++ (Chung et al. 2024) as a weight of ordinary guidance: `1 + w_i = scale / (1 - sigma_{i+1} / sigma_i)`.

    CFG++ steps from the image guided by `scale` with the noise of the unconditional answer. An Euler step of ordinary
    guidance with this weight ends at the same point; a solver of another kind is not what the paper has.

    Args:
        scale: their lambda, in [0, 1]; 0 is unconditional.
        sigmas: the noise levels of the run.

    Raises:
        ValueError: a `scale` outside [0, 1]; of the function, a level at which no step begins.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"the scale of CFG++ must lie in [0, 1], but is {scale}")
    levels = [float(sigma) for sigma in sigmas]
    below = dict(pairwise(levels))

    def weight(sigma: float) -> float:
        begins = min(below, key=lambda level: abs(level - sigma))
        if not math.isclose(begins, sigma, rel_tol=1e-4):
            raise ValueError(f"CFG++ needs a solver of one evaluation a step: no step begins at sigma = {sigma:g}")
        return scale / (1 - below[begins] / begins) - 1

    return weight


GUIDANCE_WEIGHTS: dict[str, Callable[..., Weight]] = {"interval": guidance_interval, "cfg_pp": cfg_plus_plus}


def make_guidance_weight(name: str, *, sigmas: Sequence[float] | Tensor, **options: Any) -> Weight:
    """A guidance weight by name; `GUIDANCE_WEIGHTS` lists them. `sigmas` are the noise levels of the run.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that it does not have.
    """
    if name == "cfg_pp":
        options["sigmas"] = sigmas
    return construct("guidance weight", name, GUIDANCE_WEIGHTS, **options)
