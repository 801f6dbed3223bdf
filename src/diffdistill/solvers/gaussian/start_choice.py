"""From which noise level the analytic start serves a solver best, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffdistill.denoiser import as_denoiser
from diffdistill.solvers.base import Solver
from diffdistill.solvers.gaussian.start import GaussianStart
from diffdistill.solvers.gaussian.statistics import GaussianStatistics
from diffdistill.solvers.heun import Heun
from diffdistill.solvers.integration import sample
from diffdistill.solvers.schedules import polynomial


@dataclass(frozen=True)
class StartChoice:
    """Where to start, as measured.

    Attributes:
        sigma: the level of least error, or None if no start is better.
        errors: mean L2 distance of the end points to the reference, by start level; None is a run without start.
    """

    sigma: float | None
    errors: dict[float | None, float]


def choose_start_sigma(
    denoiser: Callable[..., Tensor],
    statistics: GaussianStatistics,
    noise: Tensor,
    *,
    solver: Solver,
    schedule: Callable[[float], Tensor],
    candidates: Sequence[float] = (40.0, 20.0, 14.0, 10.0, 7.0, 5.0, 3.5, 2.5),
    cond: Any = None,
    reference: Tensor | None = None,
) -> StartChoice:
    """Measure from which level the analytic start serves a solver best.

    Args:
        denoiser: to sample from.
        statistics: of its data.
        noise: standard normal, `[B, ...]`: a few dozen trajectories are enough.
        solver: the solver.
        schedule: maps the level at which a run begins to its noise levels, `[num_steps + 1]`.
        candidates: levels to try; those above the denoiser's sigma_max are left out.
        cond: the condition.
        reference: end points to come close to; by default those of 64 steps of Heun's method.
    """
    denoiser = as_denoiser(denoiser)
    top = float(denoiser.sigma_max)
    if reference is None:
        end = float(schedule(top)[-1])
        levels = polynomial(num_steps=64, sigma_min=end, sigma_max=top)
        reference = sample(denoiser, noise, solver=Heun(), sigmas=levels, cond=cond)
    errors: dict[float | None, float] = {}
    for sigma in (None, *(candidate for candidate in candidates if candidate < top)):
        start = None if sigma is None else GaussianStart(statistics, sigma)
        x = sample(denoiser, noise, solver=solver, sigmas=schedule(sigma or top), cond=cond, start=start)
        errors[sigma] = float((x - reference).flatten(1).norm(dim=1).mean())
    return StartChoice(min(errors, key=lambda sigma: errors[sigma]), errors)
