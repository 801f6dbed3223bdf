"""Guidance is composition: a guided denoiser is again a denoiser. w is that of Meng et al. 2023; 0 guides nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Codec, Denoiser, as_denoiser, per_sample

_FORWARDED = ("sigma_min", "sigma_max", "sigma_data", "data_shape", "num_classes", "distilled", "latents")


class Wrapper(Denoiser):
    """A denoiser around another one, with its range, its shape and its conditions."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        super().__init__()
        self.denoiser = as_denoiser(denoiser)
        for name in _FORWARDED:
            setattr(self, name, getattr(self.denoiser, name))

    @property
    def bottleneck(self) -> nn.Module | None:
        return self.denoiser.bottleneck

    @property
    def conditional(self) -> bool:
        return self.denoiser.conditional

    @property
    def codec(self) -> Codec | None:
        return self.denoiser.codec

    def null_condition(self, cond: Any) -> Any:
        return self.denoiser.null_condition(cond)

    def check_condition(self, cond: Any, batch: int) -> None:
        self.denoiser.check_condition(cond, batch)


class _Guided(Wrapper):
    """A denoiser around another one, with a weight w: a float, or one number per sample, `[B]`."""

    w: float | Tensor  # pyright: ignore[reportIncompatibleVariableOverride] (never None here)

    def __init__(self, denoiser: Callable[..., Tensor], w: float | Tensor) -> None:
        super().__init__(denoiser)
        self.w = w

    def weights(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """w on the device of `x`, `[B]`: that of this call, or else the one that is kept."""
        if w is not None:
            return w
        if not isinstance(self.w, Tensor):
            return torch.full((len(x),), float(self.w), device=x.device)
        if self.w.device != x.device:
            # Once: a copy in every call would wait for the device.
            self.w = self.w.to(x.device)  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.w


class ClassifierFreeGuidance(_Guided):
    """`(1 + w) D(x, sigma, cond) - w D(x, sigma, null)` (Ho and Salimans 2022), as one batch of 2B, `cond` first.

    The bottleneck is that of the inner denoiser, hence sees 2B samples, of which the first B are the conditional ones.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`.
        w: guidance weight, a float or `[B]`.
        null: the condition that carries no information, in the structure of `cond`, one for all or one per sample;
            by default `denoiser.null_condition(cond)`, which is the label -1.
    """

    def __init__(self, denoiser: Callable[..., Tensor], w: float | Tensor, *, null: Any = None) -> None:
        super().__init__(denoiser, w)
        self.null = null
        self.cost = 2 * self.denoiser.cost

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, w: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`, a tensor `[B, ...]` or a dict of such.

        A `w: [B]` goes before the weight that is kept.
        """
        null = self.null_condition(cond) if self.null is None else self.null
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), _pair(cond, null))
        conditional, unconditional = both.chunk(2)
        weight = self.w if w is None and not isinstance(self.w, Tensor) else per_sample(self.weights(x, w), x)
        # In this form w = 0 returns the conditional half to the last bit.
        return conditional + weight * (conditional - unconditional)


class GuidanceConditioned(_Guided):
    """A denoiser that takes w as an input, with w bound: one evaluation in place of two (Meng et al. 2023, stage 1).

    Args:
        denoiser: called as `denoiser(x, sigma, cond, w=w)` with `w: [B]`.
        w: guidance weight, a float or `[B]`.
    """

    def __init__(self, denoiser: Callable[..., Tensor], w: float | Tensor) -> None:
        super().__init__(denoiser, w)
        self.cost = self.denoiser.cost

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, w: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`; a `w: [B]` goes before the weight that is kept."""
        return self.denoiser(x, sigma, cond, w=self.weights(x, w))


def guided(denoiser: Callable[..., Tensor], w: float | Tensor) -> Denoiser:
    """Guide a denoiser by w (float or `[B]`): through its own input where it takes w, else classifier-free.

    Warns where w lies outside the range that a denoiser was trained for, and where a denoiser takes no condition: that
    one is returned as it is. A w on another device than the CPU is not checked, which would wait for the device.
    """
    denoiser = as_denoiser(denoiser)
    w_range = denoiser.w_range
    if w_range is None:
        if not denoiser.conditional:
            warnings.warn("this denoiser takes no condition, so that no w guides it: w is ignored", stacklevel=2)
            return denoiser
        return ClassifierFreeGuidance(denoiser, w)
    if not isinstance(w, Tensor) or w.device.type == "cpu":
        values = torch.as_tensor(w).detach()
        low, high = float(values.min()), float(values.max())
        if low < w_range[0] or high > w_range[1]:
            wrong = low if low < w_range[0] else high
            warnings.warn(
                f"guidance weight w = {wrong:g} lies outside the trained range {w_range[0]:g} to {w_range[1]:g}",
                stacklevel=2,
            )
    return GuidanceConditioned(denoiser, w)


def _pair(cond: Any, null: Any) -> Any:
    """Both conditions along the batch, `cond` first, in the structure that they share."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: _pair(value, null[name]) for name, value in cond.items()}
    return torch.cat([cond, null.expand_as(cond)])
