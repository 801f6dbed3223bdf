"""Guidance is composition: a guided denoiser is again a denoiser. w is that of Meng et al. 2023; 0 guides nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Codec, Denoiser, as_denoiser, per_sample
from diffdistill.registry import construct

_FORWARDED = ("sigma_min", "sigma_max", "sigma_data", "data_shape", "num_classes", "flow_map", "distilled", "latents")


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

    def weights(self, x: Tensor) -> Tensor:
        """w on the device of `x`, `[B]`."""
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
        interval: the levels that are guided, `low < sigma <= high`; all others are not (Kynkaanniemi et al. 2024).
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        w: float | Tensor = 0.0,
        *,
        null: Any = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(denoiser, w)
        self.null = null
        self.interval = check_interval(interval)
        self.cost = 2 * self.denoiser.cost

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, w: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`, a tensor `[B, ...]` or a dict of such.

        `w: [B]` takes the place of the bound weight: so a guided model is called as a student that takes w.
        """
        conditional, other = self.answers(x, sigma, cond)
        return self.combine(conditional, other, self._weight(x, sigma, w))

    def answers(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """The conditional answer, and the one that guidance leads away from."""
        null = self.null_condition(cond) if self.null is None else self.null
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), _pair(cond, null))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def combine(self, conditional: Tensor, other: Tensor, w: float | Tensor) -> Tensor:
        """The guided answer; `w` is a number, or broadcasts to the answers."""
        # In this form w = 0 returns the conditional half to the last bit.
        return conditional + w * (conditional - other)

    def _weight(self, x: Tensor, sigma: Tensor, w: Tensor | None) -> float | Tensor:
        if w is None and self.interval is None and not isinstance(self.w, Tensor):
            return self.w
        w = self.weights(x) if w is None else w
        if self.interval is not None:
            low, high = self.interval
            w = w * ((sigma > low) & (sigma <= high))
        return per_sample(w, x)


class AutoGuidance(ClassifierFreeGuidance):
    """`D + w (D - D_weak)`, away from a weaker model under the same condition (Karras et al. 2024, with 1 + w).

    Args:
        denoiser: the model.
        w: guidance weight, a float or `[B]`.
        weak: a smaller or less trained model of the same data.
        interval: as for `ClassifierFreeGuidance`.

    Raises:
        ValueError: models of other data than each other's.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        w: float | Tensor = 0.0,
        *,
        weak: Callable[..., Tensor],
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(denoiser, w, interval=interval)
        self.weak = as_denoiser(weak)
        mine, other = (tuple(d.data_shape) for d in (self.denoiser, self.weak))
        if mine and other and mine != other:
            raise ValueError(f"the weak model denoises {list(other)}, but the model it guides {list(mine)}")
        self.cost = self.denoiser.cost + self.weak.cost

    def answers(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        return self.denoiser(x, sigma, cond), self.weak(x, sigma, cond)


class ProjectedGuidance(ClassifierFreeGuidance):
    """Adaptive projected guidance without momentum, which saturates less (Sadat et al. 2024, APG, Section 4).

    Of the difference of both answers, the part along the conditional one counts `eta` times. Momentum would make the
    answer one of the whole run in place of x and sigma, which no student can be taught.

    Args:
        denoiser, w, null, interval: as for `ClassifierFreeGuidance`.
        eta: weight of the parallel part; 1 is classifier-free guidance.
        radius: longest difference, as a norm over a sample; None for no limit.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        w: float | Tensor = 0.0,
        *,
        eta: float = 0.0,
        radius: float | None = None,
        null: Any = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(denoiser, w, null=null, interval=interval)
        if radius is not None and not radius > 0:
            raise ValueError(f"radius must be a positive number or null, but is {radius}")
        self.eta, self.radius = eta, radius

    def combine(self, conditional: Tensor, other: Tensor, w: float | Tensor) -> Tensor:
        difference = conditional - other
        if self.radius is not None:
            length = per_sample(difference.flatten(1).norm(dim=1), difference)
            difference = difference * (self.radius / length.clamp(min=self.radius))
        product = (difference * conditional).flatten(1).sum(1) / conditional.square().flatten(1).sum(1).clamp(min=1e-12)
        parallel = per_sample(product, conditional) * conditional
        return conditional + w * (difference - (1 - self.eta) * parallel)


class RescaledGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose answer has the spread of the conditional one (Lin et al. 2023, Section 3.4).

    Args:
        denoiser, w, null, interval: as for `ClassifierFreeGuidance`.
        phi: share of the rescaled answer; 0 is classifier-free guidance.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        w: float | Tensor = 0.0,
        *,
        phi: float = 0.7,
        null: Any = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(denoiser, w, null=null, interval=interval)
        if not 0 <= phi <= 1:
            raise ValueError(f"phi must lie between 0 and 1, but is {phi}")
        self.phi = phi

    def combine(self, conditional: Tensor, other: Tensor, w: float | Tensor) -> Tensor:
        guided = super().combine(conditional, other, w)
        spread, wanted = (answer.flatten(1).std(1) for answer in (guided, conditional))
        return guided * per_sample(self.phi * wanted / spread + (1 - self.phi), guided)


GUIDANCES: dict[str, Callable[..., ClassifierFreeGuidance]] = {
    "cfg": ClassifierFreeGuidance,
    "auto": AutoGuidance,
    "apg": ProjectedGuidance,
    "rescale": RescaledGuidance,
}
"""The guided teachers of stage 1, by name."""


def make_guidance(name: str, denoiser: Callable[..., Tensor], **options: Any) -> ClassifierFreeGuidance:
    """A guided denoiser that is called as a student that takes w: `(x, sigma, cond, w=w)`.

    Args:
        name: one of `GUIDANCES`.
        denoiser: the model.
        options: of the guidance; `weak` of "auto" is a denoiser.

    Raises:
        ValueError: an unknown name, an option out of range.
        TypeError: an option that the guidance does not have, or a missing one.
    """
    return construct("guidance", name, GUIDANCES, denoiser, **options)


def check_interval(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """The two ends of an interval of noise levels, or a `ValueError`."""
    if interval is None:
        return None
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be two levels, 0 <= low < high, but is {list(interval)}")
    return float(interval[0]), float(interval[1])


class GuidanceConditioned(_Guided):
    """A denoiser that takes w as an input, with w bound: one evaluation in place of two (Meng et al. 2023, stage 1).

    Args:
        denoiser: called as `denoiser(x, sigma, cond, w=w)` with `w: [B]`.
        w: guidance weight, a float or `[B]`.
    """

    def __init__(self, denoiser: Callable[..., Tensor], w: float | Tensor) -> None:
        super().__init__(denoiser, w)
        self.cost = self.denoiser.cost

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Any = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`; of a flow map, for a step that ends at `s: [B]`.

        `w: [B]` takes the place of the bound weight.
        """
        ends = {} if s is None else {"s": s}
        return self.denoiser(x, sigma, cond, w=self.weights(x) if w is None else w, **ends)


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
