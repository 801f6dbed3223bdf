"""Samplers of consistency models: LCM and TCD. For models that were distilled for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.base import Solver
from diffdistill.solvers.discrete_time import interpolate, make_table
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.levels import shared
from diffdistill.solvers.step import Step, factor


class LCM(Solver):
    """`x_next = denoised + sigma_next n`: multistep consistency sampling (Song et al. 2023, Algorithm 1).

    Latent consistency models sample so (Luo et al. 2023). It has no order: for other models it is no solver.
    """

    stochastic = True
    takes_correction = False

    def update(self, step: Step) -> Tensor:
        denoised = step.evaluation.denoised
        return denoised + factor(step.sigma_next, denoised) * step.fresh


class TCD(Euler):
    """An Euler step beyond the next level, to the time `(1 - eta) t_next`, then noise back (Zheng et al. 2024, Eq. 24).

    Args:
        eta: 0 is Euler, 1 goes to the lowest level and back.
        table: noise levels `[T]` of the model, increasing, or the name of a known table: times are places in it.
    """

    stochastic = True
    takes_correction = False

    def __init__(self, *, eta: float = 0.3, table: str | Sequence[float] | Tensor = "scaled_linear") -> None:
        super().__init__()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], but is {eta}")
        self.eta = eta
        self.table = make_table(table)

    def below(self, sigma: Tensor) -> Tensor:
        """The level to which a step to `sigma: [B]` goes first."""
        levels = self.table.to(sigma)
        places = torch.arange(len(levels), dtype=sigma.dtype, device=sigma.device)
        place = interpolate(sigma.log(), levels.log(), places)
        lower = interpolate(((1 - self.eta) * place).floor().clamp(min=0), places, levels.log()).exp()
        return torch.minimum(lower, sigma)

    def update(self, step: Step) -> Tensor:
        sigma_next = step.interval.sigma_next
        if self.eta == 0:
            return super().update(step)
        if isinstance(step.sigma_next, Tensor):
            lower = self.below(sigma_next)
        else:  # a number is looked up on the CPU, so that the table need not be copied to a GPU
            level = torch.tensor([step.sigma_next], dtype=self.table.dtype)
            lower = shared(self.below(level).item(), len(step.x), step.x.device)
        x = super().update(replace(step, interval=replace(step.interval, sigma_next=lower)))
        return x + per_sample((sigma_next**2 - lower**2).sqrt(), x) * step.fresh
