"""Flow maps: a student that is told where its step ends takes steps of any length (Sabour et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.progressive.objective import Hop, StepRegression, bound, check_share, ramp, refuse_compilation
from diffdistill.progressive.targets import eulerian_target, lagrangian_target, normalised, two_hop_target
from diffdistill.registry import choose
from diffdistill.solvers import ProbabilityFlow
from diffdistill.training.noise_levels import NoiseLevels
from diffdistill.training.randomness import rand

FORMS = ("eulerian", "lagrangian", "shortcut")


class FlowMapDistillation(StepRegression):
    """`D(x, sigma, s, y, w)` for every step from sigma to s, at once.

    A share of each batch, the anchors, ends where it begins: there the target is the teacher's answer, as in stage 1. A
    share ends at 0. The other steps end anywhere between, evenly in `atan(s / sigma_data)`.

    Args:
        teacher, weighting, w_range, error: as for `StepRegression`.
        student: from `models.flow_map_student(teacher)`.
        noise_levels: distribution of where steps begin.
        form: what moves: "eulerian" the beginning of the step (`targets.eulerian_target`), "lagrangian" its end
            (`targets.lagrangian_target`), or "shortcut" nothing: two hops of half the length are the student's own
            (Frans et al. 2025), which takes no derivative.
        anchors: share of steps with s = sigma.
        to_zero: share of steps with s = 0.
        warmup: share of the run over which the derivative of the eulerian form comes in; where it does not count, the
            target is the teacher's answer.
        normalise: shorten steps to the target where derivatives are taken, see `targets.normalised`.

    Raises:
        ValueError: a student that takes no s, an unknown form, or shares that are not.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        noise_levels: NoiseLevels,
        weighting: Callable[[Tensor], Tensor],
        w_range: tuple[float, float] | None = None,
        error: str = "squared",
        form: Literal["eulerian", "lagrangian", "shortcut"] = "eulerian",
        anchors: float = 0.25,
        to_zero: float = 0.15,
        warmup: float = 0.3,
        normalise: bool = True,
    ) -> None:
        super().__init__(teacher, student, weighting=weighting, w_range=w_range, error=error)
        if not getattr(student, "flow_map", False):
            raise ValueError("the student takes no end of a step s: make it with models.flow_map_student")
        self.form = choose("form", form, {name: name for name in FORMS})
        self.noise_levels = noise_levels
        self.anchors, self.to_zero = check_share("anchors", anchors), check_share("to_zero", to_zero)
        if self.anchors + self.to_zero > 1:
            raise ValueError(f"anchors + to_zero must be at most 1, but are {anchors} + {to_zero}")
        self.warmup, self.normalise = check_share("warmup", warmup), normalise

    @property
    def forward_mode(self) -> bool:
        """Whether derivatives in forward mode are taken."""
        return self.form != "shortcut"

    def draw(self, count: int, generator: torch.Generator) -> Hop:
        sigma = self.noise_levels(count, generator)
        kind, place = (rand((count,), generator, dtype=torch.float64) for _ in range(2))
        scale = float(self.trained.sigma_data)  # pyright: ignore[reportArgumentType]
        angle = (sigma / scale).atan()
        s = scale * (place * angle).tan()
        s = torch.where(kind < self.anchors, sigma, torch.where(kind >= 1 - self.to_zero, 0.0, s))
        if self.form == "lagrangian":  # which takes a derivative in ln s
            s = s.maximum(sigma.clamp(max=float(self.teacher.sigma_min)))
        return Hop(sigma, s, scale * (0.5 * (angle + (s / scale).atan())).tan())

    def target(self, x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        teacher = bound(self.teacher, w)
        if self.form == "shortcut":
            return self._shortcut(teacher, x, hop, cond, w)
        if self.form == "eulerian":
            student, now = bound(self.trained, w, hop.sigma_next), ramp(self.progress, self.warmup)
            denoised, target = eulerian_target(teacher, student, x, hop.sigma, hop.sigma_next, cond, ramp=now)
        else:
            denoised, target = lagrangian_target(
                teacher,
                lambda x, sigma, cond, s: bound(self.trained, w, s)(x, sigma, cond),
                x,
                hop.sigma,
                hop.sigma_next,
                cond,
            )
        if not self.normalise:
            return target
        anchored = per_sample(hop.sigma_next == hop.sigma, x).bool()
        return torch.where(anchored, target, normalised(denoised, target, self.weighting(hop.sigma)))

    def _shortcut(self, teacher: Callable[..., Tensor], x: Tensor, hop: Hop, cond: Any, w: Tensor | None) -> Tensor:
        assert hop.sigma_mid is not None
        anchored = per_sample(hop.sigma_next == hop.sigma, x).bool()
        with torch.no_grad():
            known = teacher(x, hop.sigma, cond)
        first = ProbabilityFlow(bound(self.trained, w, hop.sigma_mid), cond)
        second = ProbabilityFlow(bound(self.trained, w, hop.sigma_next), cond)
        # An anchor's step has no length, and no inverse: it takes some other step, in vain.
        end = torch.where(hop.sigma_next == hop.sigma, 0.5 * hop.sigma, hop.sigma_next)
        mid = torch.where(hop.sigma_next == hop.sigma, 0.75 * hop.sigma, hop.sigma_mid)
        return torch.where(anchored, known, two_hop_target(first, second, x, hop.sigma, mid, end))

    def compile_networks(self, backend: str = "inductor") -> None:
        if self.form == "shortcut":
            super().compile_networks(backend)
        else:
            refuse_compilation()
