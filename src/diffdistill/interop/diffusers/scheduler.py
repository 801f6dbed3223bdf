"""Schedulers for the stock pipelines of diffusers that run any solver of the toolbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers.flow_scheduler import FlowSolverScheduler, UnscaledSolverScheduler
from diffdistill.interop.diffusers.levels import levels_of, stock
from diffdistill.interop.diffusers.solver_scheduler import SolverScheduler
from diffdistill.learned.storage import LearnedSolver
from diffdistill.solvers import FeatureTap, Solver


def scheduler_for(
    pipeline: Any,
    *,
    solver: Solver | LearnedSolver | Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
) -> SolverScheduler:
    """A scheduler that runs a solver in `pipeline`, at the noise levels and with the prediction type of its own one.

    Args:
        pipeline: a pipeline of diffusers; it is not changed: assign the result to `pipeline.scheduler`.
        solver: options of `make_solver`, `{"name": "stochastic"}`, or a solver itself, such as an `AMEDPlugin`, which
            is then not saved with the pipeline; or a learned solver from `load_predictor`, which brings its own levels.
        schedule: as in `SolverScheduler`.
        sigmas: as in `SolverScheduler`.

    Raises:
        ValueError: as `make_solver` and `make_schedule`; a solver that reads a bottleneck of a network that has none;
            a learned solver with other levels than its own, an analytic start, or thresholding.
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
    config = {name: value for name, value in dict(own.config).items() if not name.startswith("_")}
    levels = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    options = None if isinstance(solver, Solver) or solver is None else dict(solver)
    kind: type[SolverScheduler] = SolverScheduler
    if levels_of(own).preconditioning["name"] == "flow":
        kind = FlowSolverScheduler
    elif not hasattr(pipeline, "prepare_latents"):  # where others scale their noise
        kind = UnscaledSolverScheduler
    made = kind(solver=options, schedule=schedule, sigmas=levels, source=type(own).__name__, source_config=config)
    if isinstance(solver, Solver):
        made.solver = made.usable(solver)
        made.set_timesteps(made.num_inference_steps)
    if made.solver.features != "unused":
        block = getattr(getattr(pipeline, "unet", None), "mid_block", None)
        if block is None and made.solver.features == "required":
            raise ValueError(f"the learned solver reads a bottleneck, but {type(pipeline).__name__} has no UNet")
        made.features = None if block is None else FeatureTap(block)
    return made


def student_scheduler(pipeline: Any, distilled: Distilled) -> SolverScheduler:
    """The scheduler of a few-step student, deterministic or stochastic, given its `Distilled`."""
    name = "stochastic" if distilled.sampler == "stochastic" else "euler"
    return scheduler_for(pipeline, solver={"name": name}, sigmas=distilled.sigmas)


__all__ = ["FlowSolverScheduler", "SolverScheduler", "UnscaledSolverScheduler", "scheduler_for", "student_scheduler"]
