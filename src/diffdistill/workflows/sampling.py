"""`sample`: any model, by any solver, from noise or from seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from diffdistill.solvers.base import Solver
from diffdistill.solvers.guidance import make_guidance_weight
from diffdistill.solvers.integration import Trajectory
from diffdistill.solvers.integration import sample as along

if TYPE_CHECKING:
    from diffdistill.learned import LearnedSolver
    from diffdistill.sampling.plans import Plan
    from diffdistill.solvers import GaussianStart


@overload
def sample(
    denoiser: Callable[..., Tensor] | str,
    noise: Tensor | int,
    *,
    solver: Solver | LearnedSolver | Mapping[str, Any] | str | None = None,
    sigmas: Tensor | None = None,
    cond: Any = None,
    w: float | None = None,
    num_steps: int | None = None,
    schedule: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | float | Mapping[str, Any] | None = None,
    batch_size: int = 256,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | Mapping[str, Any] | None = None,
    return_trajectory: Literal[False] = False,
) -> Tensor: ...


@overload
def sample(
    denoiser: Callable[..., Tensor] | str,
    noise: Tensor,
    *,
    solver: Solver | LearnedSolver | Mapping[str, Any] | str | None = None,
    sigmas: Tensor | None = None,
    cond: Any = None,
    w: float | None = None,
    num_steps: int | None = None,
    schedule: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | float | Mapping[str, Any] | None = None,
    batch_size: int = 256,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | Mapping[str, Any] | None = None,
    return_trajectory: Literal[True],
) -> Trajectory: ...


def sample(
    denoiser: Callable[..., Tensor] | str,
    noise: Tensor | int,
    *,
    solver: Solver | LearnedSolver | Mapping[str, Any] | str | None = None,
    sigmas: Tensor | None = None,
    cond: Any = None,
    w: float | None = None,
    num_steps: int | None = None,
    schedule: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | float | Mapping[str, Any] | None = None,
    batch_size: int = 256,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | Mapping[str, Any] | None = None,
    return_trajectory: bool = False,
) -> Tensor | Trajectory:
    """Draw samples.

        sample(denoiser, noise, solver=make_solver("dpmpp"), sigmas=make_schedule("polynomial", ...))
        sample(student, 16, w=2.0)
        sample("digits-teacher", 16, solver="dpmpp", num_steps=10, w=1.0)

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`, or the name or path of a model.
        noise: standard normal, unscaled, `[B, ...]`; or how many samples to draw, sample i from the seed `seed + i`.
        solver: from `make_solver`, its name or its options; a learned solver, or `{"name": "learned", "predictor":
            NAME}`. By default "euler"; a few-step student brings its own.
        sigmas: the schedule, from `make_schedule`; a few-step student and a learned solver bring their own.
        cond: the condition. For a number of samples: a class or a list of classes that is repeated, by default all
            classes evenly.
        w: guidance weight.
        num_steps: in place of `sigmas`, steps of a schedule between the ends of the model.
        schedule: with `num_steps`, options of `make_schedule`; by default "cosine" down to 0.
        seed: of the first sample, for a number of samples.
        seeds: of the noise of stochastic solvers, one for each sample of a tensor `noise`.
        start: analytic start: a `GaussianStart`, a noise level, or `sigma` and `statistics`.
        batch_size: samples at a time, for a number of samples.
        denoise_to_zero: one more evaluation at the last level; for a tensor `noise`.
        thresholding: as of `diffdistill.solvers.sample`; for a tensor `noise`.
        guidance: in place of w, a weight that depends on the noise level: a function such as `guidance_interval` makes,
            or options of `make_guidance_weight`, for a denoiser that takes w with every call.
        return_trajectory: all points and the counted evaluations; for a tensor `noise`.

    Returns:
        The samples `[B, ...]`, or a `Trajectory`. For a number of samples, what latents decode to.

    Raises:
        ValueError, TypeError: as `diffdistill.solvers.sample` and `sampling.plans.plan`.
    """
    options = {"denoise_to_zero": denoise_to_zero, "thresholding": thresholding, "return_trajectory": return_trajectory}
    if (
        isinstance(noise, Tensor)
        and isinstance(solver, Solver)
        and sigmas is not None
        and not isinstance(denoiser, str)
    ):
        if num_steps is not None or schedule is not None:
            raise ValueError("sigmas are the schedule: leave out num_steps and schedule")
        if w is not None:
            from diffdistill.models import guided

            denoiser = guided(denoiser, w)
        given: Any = start
        if isinstance(guidance, Mapping):
            guidance = make_guidance_weight(**{"sigmas": sigmas, **guidance})
        options["guidance"] = guidance
        return along(denoiser, noise, solver=solver, sigmas=sigmas, cond=cond, seeds=seeds, start=given, **options)
    if guidance is not None and w is not None:
        raise ValueError(f"guidance has a weight of its own: leave out w={w:g}")
    planned = _planned(denoiser, solver, sigmas, w if guidance is None else 0.0, num_steps, schedule, start)
    if isinstance(guidance, Mapping):
        guidance = make_guidance_weight(**{"sigmas": planned.sigmas, **guidance})
    planned = replace(planned, guidance=guidance)
    if isinstance(noise, Tensor):
        given = {"solver": planned.solver, "sigmas": planned.sigmas, "start": planned.start, "guidance": guidance}
        return along(planned.denoiser, noise, cond=cond, seeds=seeds, **given, **options)
    unused = [name for name, value in options.items() if value] + (["seeds"] if seeds is not None else [])
    if unused:
        raise ValueError(f"{unused[0]} is for noise that is given as a tensor: leave it out for {noise} samples")
    from diffdistill.sampling.generation import generate
    from diffdistill.sampling.samples import chosen_labels

    labels = cond if isinstance(cond, Tensor) else chosen_labels(cond, noise, planned.denoiser)
    return torch.cat(list(generate(planned, range(seed, seed + noise), labels, batch_size=batch_size)))


def _planned(
    model: Any,
    solver: Any,
    sigmas: Tensor | None,
    w: float | None,
    num_steps: int | None,
    schedule: Mapping[str, Any] | None,
    start: Any,
) -> Plan:
    """How to sample a model of ours, as it says itself but for what is given."""
    from diffdistill.denoiser import Denoiser
    from diffdistill.learned import LearnedSolver
    from diffdistill.models import Wrapper, guided, load_denoiser
    from diffdistill.sampling.plans import Plan, plan
    from diffdistill.solvers import GaussianStart

    model = load_denoiser(model) if isinstance(model, str) else model
    if not isinstance(model, Denoiser):
        model = Wrapper(model)
    if isinstance(solver, LearnedSolver):
        denoiser = model if w is None else guided(model, w)
        if any(value is not None for value in (sigmas, schedule, start)):
            raise ValueError("a learned solver brings its own noise levels: leave out sigmas, schedule and start")
        solver.check(denoiser, num_steps=num_steps)
        return Plan(denoiser, solver.solver, solver.sigmas, solver.gaussian_start())
    named = {"name": solver} if isinstance(solver, str) else None if isinstance(solver, Solver) else solver
    if sigmas is not None:
        if num_steps is not None or schedule is not None:
            raise ValueError("sigmas are the schedule: leave out num_steps and schedule")
        num_steps, schedule = len(sigmas) - 1, {"name": "cosine"}
    begin = None if isinstance(start, GaussianStart) else start
    planned = plan(model, w=w, solver=named, schedule=schedule, num_steps=num_steps, start=begin)
    changes = {
        "solver": solver if isinstance(solver, Solver) else None,
        "sigmas": sigmas,
        "start": start if isinstance(start, GaussianStart) else None,
    }
    return replace(planned, **{name: value for name, value in changes.items() if value is not None})
