"""Fast ODE solvers for diffusion models. Needs torch and numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffdistill.registry import construct, enter
from diffdistill.solvers.amed import AMED, AMEDPlugin, AMEDPredictor, LearnedTable, Predictor, TabulatedPredictor
from diffdistill.solvers.ancestral import EulerAncestral
from diffdistill.solvers.base import Solver
from diffdistill.solvers.consistency import LCM, TCD
from diffdistill.solvers.deis import DEIS
from diffdistill.solvers.dpm import DPM2, DPM3, DPMpp2S, DPMpp3S
from diffdistill.solvers.dpmpp import DPMpp
from diffdistill.solvers.dpmpp_sde import DPMppSDE
from diffdistill.solvers.edm_sde import EDMStochastic
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.features import FeatureTap
from diffdistill.solvers.flow import ProbabilityFlow, dynamic_thresholding
from diffdistill.solvers.flow_map import FlowMap
from diffdistill.solvers.gaussian.start import GaussianStart
from diffdistill.solvers.gaussian.start_choice import StartChoice, choose_start_sigma
from diffdistill.solvers.gaussian.statistics import GaussianStatistics, load_gaussian, save_gaussian, shipped_gaussians
from diffdistill.solvers.gits import gits
from diffdistill.solvers.guidance import GUIDANCE_WEIGHTS, cfg_plus_plus, guidance_interval, make_guidance_weight
from diffdistill.solvers.heun import Heun
from diffdistill.solvers.integration import Trajectory, integrate, sample
from diffdistill.solvers.ipndm import IPNDM, IPNDMV
from diffdistill.solvers.named_schedules import (
    beta,
    ddim_uniform,
    exponential,
    karras,
    kl_optimal,
    sgm_uniform,
    simple,
)
from diffdistill.solvers.noise import SampleNoise, seeded_noise
from diffdistill.solvers.res_multistep import RESMultistep
from diffdistill.solvers.schedules import (
    align_your_steps,
    check_sigmas,
    cosine,
    discrete,
    flow_levels,
    logsnr,
    polynomial,
    time_uniform,
    trailing,
)
from diffdistill.solvers.step import Correction, Evaluation, Interval, Step, intervals
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
    "dpmpp_sde": DPMppSDE,
    "res_multistep": RESMultistep,
    "lcm": LCM,
    "tcd": TCD,
    "amed": AMED,
    "flow_map": FlowMap,
}

SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
    "cosine": cosine,
    "align_your_steps": align_your_steps,
    "gits": gits,
    "trailing": trailing,
    "flow": flow_levels,
    "karras": karras,
    "exponential": exponential,
    "kl_optimal": kl_optimal,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
}


def make_schedule(name: str | Sequence[float] | Tensor, **options: Any) -> Tensor:
    """Build a schedule of `num_steps + 1` noise levels, from `sigma_max` down to `sigma_min`.

    Args:
        name: one of `SCHEDULES`, whose functions document their options, or the noise levels themselves.
        options: `num_steps`, `sigma_min`, `sigma_max` and what the schedule adds to them.

    Returns:
        float64, `[num_steps + 1]`, strictly decreasing.

    Raises:
        ValueError: an unknown name, an option out of range, or levels that do not decrease.
        TypeError: an option that the schedule does not have.
    """
    if isinstance(name, str):
        return check_sigmas(construct("schedule", name, SCHEDULES, **options))
    if options:
        raise TypeError(f"a schedule given as noise levels takes no options, but got {', '.join(options)}")
    return check_sigmas(torch.as_tensor(name, dtype=torch.float64))


S = TypeVar("S", bound=type[Solver])


def register_solver(name: str) -> Callable[[S], S]:
    """A decorator that gives a `Solver` class a name for `make_solver`, configs and files of learned solvers.

    Raises:
        ValueError: the name is taken, or is no word.
        TypeError: what is decorated is no `Solver` class.
    """

    def decorate(solver: S) -> S:
        if not (isinstance(solver, type) and issubclass(solver, Solver)):
            raise TypeError(f"the solver {name!r} must be a class that extends diffdistill.solvers.Solver: {solver!r}")
        enter("solver", name, SOLVERS, solver)
        return solver

    return decorate


def make_solver(name: str, **options: Any) -> Solver:
    """Build a solver by name; `SOLVERS` lists them.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the solver does not have.
    """
    return construct("solver", name, SOLVERS, **options)


__all__ = [
    "AMED",
    "DEIS",
    "DPM2",
    "DPM3",
    "GUIDANCE_WEIGHTS",
    "IPNDM",
    "IPNDMV",
    "LCM",
    "SCHEDULES",
    "SOLVERS",
    "TCD",
    "AMEDPlugin",
    "AMEDPredictor",
    "Correction",
    "DPMpp",
    "DPMpp2S",
    "DPMpp3S",
    "DPMppSDE",
    "EDMStochastic",
    "Euler",
    "EulerAncestral",
    "Evaluation",
    "FeatureTap",
    "FlowMap",
    "GaussianStart",
    "GaussianStatistics",
    "Heun",
    "Interval",
    "LearnedTable",
    "Predictor",
    "ProbabilityFlow",
    "RESMultistep",
    "SampleNoise",
    "Solver",
    "StartChoice",
    "Step",
    "TabulatedPredictor",
    "Trajectory",
    "UniPC",
    "cfg_plus_plus",
    "choose_start_sigma",
    "dynamic_thresholding",
    "guidance_interval",
    "integrate",
    "intervals",
    "load_gaussian",
    "make_guidance_weight",
    "make_schedule",
    "make_solver",
    "register_solver",
    "sample",
    "save_gaussian",
    "seeded_noise",
    "shipped_gaussians",
]
