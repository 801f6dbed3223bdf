"""Fast ODE solvers for diffusion models. Needs torch, numpy and scipy only."""

from __future__ import annotations

from typing import Any

from diffdistill.registry import construct
from diffdistill.solvers.base import Correction, Evaluation, Interval, Solver
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.flow import ProbabilityFlow, dynamic_thresholding
from diffdistill.solvers.heun import Heun
from diffdistill.solvers.noise import SampleNoise, seeded_noise
from diffdistill.solvers.sampling import Trajectory, integrate, intervals, sample
from diffdistill.solvers.schedules import make_schedule

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "ddim": Euler,
    "heun": Heun,
}


def make_solver(name: str, **options: Any) -> Solver:
    """Build a solver by name; `SOLVERS` lists them.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the solver does not have.
    """
    return construct("solver", name, SOLVERS, **options)


__all__ = [
    "SOLVERS",
    "Correction",
    "Euler",
    "Evaluation",
    "Heun",
    "Interval",
    "ProbabilityFlow",
    "SampleNoise",
    "Solver",
    "Trajectory",
    "dynamic_thresholding",
    "integrate",
    "intervals",
    "make_schedule",
    "make_solver",
    "sample",
    "seeded_noise",
]
