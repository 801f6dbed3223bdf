"""The interface of every network: `D(x, sigma, cond) -> x0` (Karras et al. 2022, Eq. 7).

`x = x0 + sigma * n` with `n ~ N(0, I)` has shape `[B, ...]`; `sigma` has shape `[B]` and is the standard
deviation of the noise in data units. There is no other time variable above a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

NULL_LABEL = -1
"""The class label that stands for "no class"."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Cast one number per sample, `[B]`, to the dtype of `like` and to the shape `[B, 1, ...]` that broadcasts to it.

    Raises:
        ValueError: `values` does not have the shape `[B]`, with `B = like.shape[0]`.
    """
    if values.ndim != 1 or values.shape[0] != like.shape[0]:
        raise ValueError(f"expected one value per sample, shape [{like.shape[0]}], but got shape {list(values.shape)}")
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def image_shape(data_shape: tuple[int, ...], codec: Codec | None) -> tuple[int, ...]:
    """`(C, H, W)` of the images that `data_shape` stands for: itself, or what a codec decodes it to."""
    if codec is None:
        return tuple(data_shape)
    return (codec.channels, *(side * codec.factor for side in data_shape[1:]))


def spread_labels(num_samples: int, num_classes: int) -> Tensor | None:
    """Labels `[num_samples]` spread evenly over the classes, or None where there are no classes.

    Raises:
        ValueError: `num_samples` is no integer of at least 1.
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer of at least 1, but is {num_samples!r}")
    return torch.arange(num_samples) % num_classes if num_classes else None


def check_labels(labels: Any, batch: int, num_classes: int) -> None:
    """Raise `ValueError` unless `labels` is None or an integer tensor `[batch]` of labels, -1 for none."""
    if labels is None:
        return
    if num_classes == 0:
        raise ValueError("this denoiser takes no class labels: pass cond=None")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (batch,):
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"class labels are an integer tensor of shape [{batch}], not {got}")
    wrong = labels[(labels < NULL_LABEL) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(f"class label {int(wrong[0])} is unknown: labels are 0 to {num_classes - 1}, or -1 for none")


@dataclass(frozen=True)
class Distilled:
    """How a student of few steps is meant to be used: on exactly these noise levels, by exactly this sampler.

    The sampler "encoder" is the deterministic one with sigma increasing: it carries images to noise.

    Attributes:
        sigmas: the noise levels, `[num_steps + 1]`.
        sampler: that it was trained for.
        afs: whether its first step is the analytical one, which costs nothing.
        others: levels of fewer steps, for a student of several numbers of steps.
    """

    sigmas: tuple[float, ...]
    sampler: Literal["deterministic", "stochastic", "encoder"] = "deterministic"
    afs: bool = False
    others: tuple[tuple[float, ...], ...] = ()

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def counts(self) -> list[int]:
        """All numbers of steps that it was trained for, the most first."""
        return [len(levels) - 1 for levels in (self.sigmas, *self.others)]

    def levels(self, num_steps: int | None = None) -> tuple[float, ...]:
        """The levels of so many steps, by default of the most.

        Raises:
            ValueError: a number of steps that it was not trained for.
        """
        if num_steps is None:
            return self.sigmas
        if num_steps not in self.counts:
            known = " or ".join(map(str, self.counts))
            raise ValueError(f"num_steps={num_steps}: this student was distilled for {known} steps only")
        return (self.sigmas, *self.others)[self.counts.index(num_steps)]


class Codec(Protocol):
    """An autoencoder of images with `channels` channels; its latents are `factor` times smaller a side."""

    @property
    def channels(self) -> int: ...
    @property
    def factor(self) -> int: ...
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class Denoiser(nn.Module):
    """A function `D(x, sigma, cond) -> x0` that knows its range and its cost.

    Subclasses define `forward`. Any other callable `(x, sigma, cond) -> x0` can be sampled too: `as_denoiser` makes it
    one, with the defaults below for what it does not state.

    Attributes:
        sigma_min, sigma_max: the noise levels between which the denoiser is valid.
        sigma_data: standard deviation of the data.
        data_shape: shape of one sample, such as `(3, 32, 32)`.
        num_classes: number of class labels, 0 for an unconditional denoiser.
        cost: network evaluations of one call: 1, or 2 under classifier-free guidance.
        w: the guidance weight that is bound to the denoiser, a float or `[B]`, or None if it is not guided.
        w_range: guidance weights that the denoiser was trained to take as an input, or None if it takes none.
        flow_map: whether `s: [B]`, the noise level that a step ends at, is an input, `denoiser(x, sigma, cond, s=s)`.
            The answer then leads one Euler step from sigma to s to where the probability flow arrives. Without it the
            answer is the denoised image of s = sigma.
        distilled: how a few-step student is to be sampled, or None.
        bottleneck: the module whose output learned solvers read, or None.
        codec: the autoencoder of a denoiser of latents, or None where images themselves are denoised.
        latents: whether latents are denoised that another file's autoencoder makes.
        source: the name or file that it was loaded from, or None.
        config: plain values that rebuild it, or None.
        table: the noise levels of a discrete-time model, increasing, or None.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    data_shape: tuple[int, ...] = ()
    num_classes: int = 0
    cost: int = 1
    w: float | Tensor | None = None
    w_range: tuple[float, float] | None = None
    flow_map: bool = False
    distilled: Distilled | None = None
    latents: bool = False
    source: str | None = None
    config: dict[str, Any] | None = None

    @property
    def table(self) -> Tensor | None:
        return None

    @property
    def bottleneck(self) -> nn.Module | None:
        return None

    @property
    def codec(self) -> Codec | None:
        return None

    @property
    def conditional(self) -> bool:
        """Whether it takes a condition: class labels, or a dict of tensors `[B, ...]` such as text embeddings."""
        return self.num_classes > 0

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no forward(x, sigma, cond)")

    def null_condition(self, cond: Any) -> Any:
        """The condition of the same structure as `cond` that carries no information.

        Raises:
            ValueError: `cond` is not class labels, whose null is -1.
        """
        if cond is None:
            return None
        if not isinstance(cond, Tensor) or cond.is_floating_point():
            raise ValueError(
                "only class labels have a null of their own, -1: say which condition carries no information, null=..."
            )
        return torch.full_like(cond, NULL_LABEL)

    def check_condition(self, cond: Any, batch: int) -> None:
        """Raise `ValueError` unless `cond` is None or an integer label for each sample, -1 for none."""
        check_labels(cond, batch, self.num_classes)


class FunctionDenoiser(Denoiser):
    """A callable `(x, sigma, cond) -> x0` as a denoiser, with those attributes of a denoiser that the callable has.

    It takes any condition: what the condition must look like is known to the function alone.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        for name in STATED:
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    @property
    def bottleneck(self) -> nn.Module | None:
        return getattr(self.function, "bottleneck", None)

    @property
    def codec(self) -> Codec | None:
        return getattr(self.function, "codec", None)

    @property
    def conditional(self) -> bool:
        return getattr(self.function, "conditional", True)

    def null_condition(self, cond: Any) -> Any:
        own = getattr(self.function, "null_condition", None)
        return super().null_condition(cond) if own is None else own(cond)

    def check_condition(self, cond: Any, batch: int) -> None:
        pass

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, **w: Tensor) -> Tensor:
        return self.function(x, sigma, cond, **w)


STATED = ("sigma_min", "sigma_max", "sigma_data", "data_shape", "num_classes", "cost", "w", "w_range", "distilled")
"""What a callable may state of the attributes of a `Denoiser`, besides its bottleneck, its codec and its condition."""


def as_denoiser(denoiser: Callable[..., Tensor]) -> Denoiser:
    """A `Denoiser` unchanged, or any other callable `(x, sigma, cond) -> x0` wrapped as one.

    Raises:
        TypeError: it cannot be called.
    """
    if isinstance(denoiser, Denoiser):
        return denoiser
    if not callable(denoiser):
        raise TypeError(f"a denoiser is a callable (x, sigma, cond) -> x0, but this is {denoiser!r}")
    return FunctionDenoiser(denoiser)
