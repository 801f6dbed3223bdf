"""Fast ODE solvers for diffusion models. Needs torch, numpy and scipy only."""

from __future__ import annotations

from typing import Any

from diffdistill.registry import construct
from diffdistill.solvers.ancestral import EulerAncestral
from diffdistill.solvers.base import Correction, Evaluation, Interval, Solver
from diffdistill.solvers.deis import DEIS
from diffdistill.solvers.dpm import DPM2, DPM3, DPMpp2S, DPMpp3S
from diffdistill.solvers.dpmpp import DPMpp
from diffdistill.solvers.edm_sde import EDMStochastic
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.flow import ProbabilityFlow, dynamic_thresholding
from diffdistill.solvers.heun import Heun
from diffdistill.solvers.ipndm import IPNDM, IPNDMV
from diffdistill.solvers.noise import SampleNoise, seeded_noise
from diffdistill.solvers.sampling import Trajectory, integrate, intervals, sample
from diffdistill.solvers.schedules import make_schedule
from diffdistill.solvers.unipc import UniPC

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "ddim": Euler,
    "heun": Heun,
    "dpm2": DPM2,
    "dpm3": DPM3,
    "dpmpp": DPMpp,
    "dpmpp_2s": DPMpp2S,
    "dpmpp_3s": DPMpp3S,
    "unipc": UniPC,
    "deis": DEIS,
    "ipndm": IPNDM,
    "ipndm_v": IPNDMV,
    "edm_sde": EDMStochastic,
    "euler_ancestral": EulerAncestral,
}


def make_solver(name: str, **options: Any) -> Solver:
    """Build a solver by name; `SOLVERS` lists them.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the solver does not have.
    """
    return construct("solver", name, SOLVERS, **options)


__all__ = [
    "DEIS",
    "DPM2",
    "DPM3",
    "IPNDM",
    "IPNDMV",
    "SOLVERS",
    "Correction",
    "DPMpp",
    "DPMpp2S",
    "DPMpp3S",
    "EDMStochastic",
    "Euler",
    "EulerAncestral",
    "Evaluation",
    "Heun",
    "Interval",
    "ProbabilityFlow",
    "SampleNoise",
    "Solver",
    "Trajectory",
    "UniPC",
    "dynamic_thresholding",
    "integrate",
    "intervals",
    "make_schedule",
    "make_solver",
    "sample",
    "seeded_noise",
]
