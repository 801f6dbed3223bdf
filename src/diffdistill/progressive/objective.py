"""What all methods share: a student regresses the x0 that leads one step to where it should end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.registry import choose
from diffdistill.training.conditions import condition_of
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import draw_w, normal_like
from diffdistill.training.weighting import ERRORS


@dataclass(frozen=True, eq=False)
class Hop:
    """Where steps begin and end, `[B]` each, and where two hops that end there too meet, if there are two."""

    sigma: Tensor
    sigma_next: Tensor
    sigma_mid: Tensor | None = None


def bound(denoiser: Callable[..., Tensor], w: Tensor | None = None, s: Tensor | None = None) -> Callable[..., Tensor]:
    """A denoiser `(x, sigma, cond) -> x0` with a guidance weight `w` and the end `s` of its steps bound, `[B]` each."""
    inputs = {name: value for name, value in (("w", w), ("s", s)) if value is not None}
    return lambda x, sigma, cond=None: denoiser(x, sigma, cond, **inputs)


class StepRegression(Objective):
    """`E omega(sigma) || D_student(x, sigma[, s], y, w) - x0* ||^2`. Subclasses say which steps, and which x0*.

    Args:
        teacher: the frozen model; it takes w where `w_range` is given.
        student: to be trained; it takes the end of its steps too where it is a flow map.
        weighting: `omega`.
        w_range: the guidance weights to draw, or None for models that take none.
        error: of the student's answer: "squared", or "huber" (`training.weighting.pseudo_huber`).
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        weighting: Callable[[Tensor], Tensor],
        w_range: tuple[float, float] | None = None,
        error: str = "squared",
    ) -> None:
        super().__init__()
        if w_range is not None and teacher.w_range is None and teacher.config is not None:
            raise ValueError(
                f"w_range {list(w_range)}: the teacher takes no guidance weight; train one by distill_guidance first"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.trained = student
        self.weighting = weighting
        self.w_range = w_range
        self.error = choose("error", error, ERRORS)

    def train(self, mode: bool = True) -> StepRegression:
        """Keep dropout off: the target is a function of the input, and noise in the student would only blur it."""
        super().train(False)
        return self

    def draw(self, count: int, generator: torch.Generator) -> Hop:
        """The steps of a batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no draw(count, generator)")

    def target(self, x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        """The x0 that the student should answer at `x`, without a graph."""
        raise NotImplementedError(f"{type(self).__name__} defines no target(x, hop, cond, w)")

    def ends(self, sigma_next: Tensor) -> Tensor | None:
        """What the student is told of the end of its steps."""
        return sigma_next if getattr(self.trained, "flow_map", False) else None

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds images `x` `[B, ...]` and, for a conditional model, conditions as `condition_of` reads them."""
        x, y = batch["x"], condition_of(batch, self.trained)
        hop = self.draw(len(x), generator)
        noisy = x + per_sample(hop.sigma, x) * normal_like(x, generator)
        w = None if self.w_range is None else draw_w(self.w_range, len(x), generator)
        target = self.target(noisy, hop, y, w)
        prediction = bound(self.trained, w, self.ends(hop.sigma_next))(noisy, hop.sigma, y)
        return Loss(self.error(prediction, target, self.weighting(hop.sigma)), {})


def ramp(progress: float, warmup: float) -> float:
    """0 at the beginning, 1 from `warmup` on."""
    return min(progress / warmup, 1.0) if warmup > 0 else 1.0


def check_share(name: str, value: float) -> float:
    """Raise a `ValueError` unless a setting is a share of a whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, but is {value!r}")
    return float(value)


def refuse_compilation() -> None:
    """Raise the `ValueError` of methods that differentiate in forward mode."""
    raise ValueError(
        "trainer.compile: torch.compile has no derivatives in forward mode, which this method takes; choose "
        "compile=false, or a method without them: halving, trajectory, consistency"
    )
