"""Schedulers for the stock pipelines of diffusers that run any solver of the toolbox."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers.flow_scheduler import FlowSolverScheduler
from diffdistill.interop.diffusers.levels import stock
from diffdistill.interop.diffusers.scheduler_features import Bottleneck
from diffdistill.interop.diffusers.scheduler_guidance import guidance_by_level
from diffdistill.interop.diffusers.scheduler_sources import read_source
from diffdistill.interop.diffusers.solver_scheduler import SolverScheduler
from diffdistill.learned.storage import LearnedSolver
from diffdistill.solvers import Solver


def scheduler_for(
    pipeline: Any,
    *,
    solver: str | Solver | LearnedSolver | Mapping[str, Any] = "ddim",
    schedule: str | Mapping[str, Any] | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    inverse: bool = False,
) -> SolverScheduler:
    """A scheduler that runs a solver in `pipeline`, with the noise levels, units and settings of its own one.

    Args:
        pipeline: a pipeline of diffusers; it is not changed: assign the result to `pipeline.scheduler`.
        solver: a name or options of `make_solver`, "stochastic", or a solver itself, such as an `AMEDPlugin`, which is
            then not saved with the pipeline; or a learned solver from `load_predictor`, which brings its own levels.
        schedule: a name or options of `make_schedule`, as in `SolverScheduler`.
        sigmas: as in `SolverScheduler`.
        inverse: encode images, as in `SolverScheduler`: for the `inverse_scheduler` of pipelines that have one.

    Raises:
        ValueError: as `make_solver` and `make_schedule`; a scheduler that is not known; a solver that reads a
            bottleneck of a network that has none; a learned solver with other levels than its own, an analytic start,
            or thresholding; a solver of several evaluations a step in a pipeline that does not expect such.
    """
    if isinstance(solver, LearnedSolver):
        if schedule is not None or sigmas is not None:
            raise ValueError("a learned solver brings its own noise levels: leave out schedule and sigmas")
        if solver.start is not None:
            raise ValueError("this learned solver has an analytic start, for which stock pipelines have no place")
        if solver.thresholding is not None:
            raise ValueError(
                "this learned solver was trained with thresholding, for which stock pipelines have no place"
            )
        sigmas, solver = solver.sigmas, solver.solver
    own = stock(pipeline.scheduler)
    kind = FlowSolverScheduler if read_source(own).flow else SolverScheduler
    made = kind(
        solver={"name": "ddim"} if isinstance(solver, Solver) else _named(solver),
        schedule=None if schedule is None else _named(schedule),
        sigmas=None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).tolist(),
        source=type(own).__name__,
        source_config=own.config,
        inverse=inverse,
    )
    if isinstance(solver, Solver):
        made.use(solver)
    if made.solver.stages > 1 and _counts_timesteps(pipeline):
        raise ValueError(
            f"{type(pipeline).__name__} counts timesteps as steps: it takes solvers of one evaluation a step, not "
            f"{type(made.solver).__name__}"
        )
    if made.solver.features != "unused":
        block = getattr(getattr(pipeline, "unet", None), "mid_block", None)
        if block is None and made.solver.features == "required":
            raise ValueError(f"the learned solver reads a bottleneck, but {type(pipeline).__name__} has no UNet")
        made.bottleneck = None if block is None else Bottleneck(block)
    return made


def _counts_timesteps(pipeline: Any) -> bool:
    """Whether a pipeline finds the timestep of a strength without the scheduler's `order`: Kandinsky's do."""
    find = getattr(type(pipeline), "get_timesteps", None)
    try:
        return find is not None and "scheduler.order" not in inspect.getsource(find)
    except (OSError, TypeError):  # a class without a source
        return False


def _named(options: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": options} if isinstance(options, str) else dict(options)


def student_scheduler(pipeline: Any, distilled: Distilled) -> SolverScheduler:
    """The scheduler of a few-step student, deterministic or stochastic, given its `Distilled`."""
    name = "stochastic" if distilled.sampler == "stochastic" else "euler"
    return scheduler_for(pipeline, solver=name, sigmas=distilled.sigmas)


__all__ = ["FlowSolverScheduler", "SolverScheduler", "guidance_by_level", "scheduler_for", "student_scheduler"]
