"""`sample`: carry noise to data along a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from diffdistill.denoiser import as_denoiser
from diffdistill.registry import choose
from diffdistill.solvers.base import Solver
from diffdistill.solvers.brownian import BrownianNoise
from diffdistill.solvers.features import feature_tap
from diffdistill.solvers.flow import ProbabilityFlow, dynamic_thresholding
from diffdistill.solvers.gaussian.start import GaussianStart
from diffdistill.solvers.levels import shared
from diffdistill.solvers.noise import SampleNoise
from diffdistill.solvers.schedules import check_sigmas
from diffdistill.solvers.step import History, Interval, intervals

THRESHOLDING: dict[str, Callable[[Tensor], Tensor]] = {"dynamic": dynamic_thresholding}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A whole run: `x: [points, B, ...]` at `sigmas: [points]`, both ends included, and the evaluations it took."""

    x: Tensor
    sigmas: Tensor
    nfe: int


def integrate(
    flow: ProbabilityFlow,
    x: Tensor,
    solver: Solver,
    steps: Sequence[Interval],
    noise: SampleNoise | BrownianNoise | None = None,
    history: History = (),
) -> Iterator[Tensor]:
    """Yield the state after each step, given past evaluations. Gradients flow unless the caller disables them.

    For those of a sample with respect to the levels `sigmas: [num_steps + 1]` or the parameters of the denoiser:
    `*_, x = integrate(ProbabilityFlow(denoiser, cond), sigmas[0] * noise, solver, intervals(sigmas, B))`.
    """
    for interval in steps:
        draw = None
        if isinstance(noise, BrownianNoise):
            draw = noise.draw(dtype=x.dtype, device=x.device, interval=interval)
        elif noise is not None and solver.stochastic:
            draw = noise.draw(dtype=x.dtype, device=x.device)
        x, history = solver.step(flow, x, interval, history, noise=draw)
        yield x


@overload
def sample(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    *,
    solver: Solver,
    sigmas: Tensor,
    cond: Any = None,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | None = None,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | None = None,
    return_trajectory: Literal[False] = False,
) -> Tensor: ...


@overload
def sample(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    *,
    solver: Solver,
    sigmas: Tensor,
    cond: Any = None,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | None = None,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | None = None,
    return_trajectory: Literal[True],
) -> Trajectory: ...


def sample(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    *,
    solver: Solver,
    sigmas: Tensor,
    cond: Any = None,
    seeds: Sequence[int] | Tensor | None = None,
    start: GaussianStart | None = None,
    denoise_to_zero: bool = False,
    thresholding: str | Callable[[Tensor], Tensor] | None = None,
    guidance: Callable[[float], float] | None = None,
    return_trajectory: bool = False,
) -> Tensor | Trajectory:
    """Carry `noise` along the schedule `sigmas` to a sample. Gradients are kept where `noise` requires them.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`; it is given sigma in float64, `[B]`.
        noise: standard normal, unscaled, `[B, ...]`; its dtype and device are those of the state.
        solver: from `make_solver`.
        sigmas: from `make_schedule`, `[num_steps + 1]`; where it ends at 0, the last step returns the denoised image.
        cond: the condition, such as integer class labels `[B]`.
        seeds: one seed per sample for the noise of stochastic solvers, by default 0 .. B - 1.
        start: carries the noise from sigma_max to a lower level at no evaluation; `sigmas` begin at that level.
        denoise_to_zero: one more evaluation at the last level, whose denoised image is the result.
        thresholding: "dynamic", or a function applied to every prediction of x0. Not for latents.
        guidance: the guidance weight w at a noise level, such as `guidance_interval` makes, for a denoiser that takes
            w: a student, or `guided(denoiser, 0)`.
        return_trajectory: return all points and the counted evaluations.

    Returns:
        The sample `[B, ...]`, or a `Trajectory`.

    Raises:
        ValueError: levels that do not decrease, unknown thresholding, labels of the wrong shape, another number of
            seeds than of samples, a learned solver that reads the bottleneck of a denoiser that declares none, levels
            that do not begin where `start` ends, a denoiser that answers in another shape.
        TypeError: `solver` is no `Solver`, or `start` no `GaussianStart`.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, such as make_solver makes, but is {solver!r}")
    if start is not None and not isinstance(start, GaussianStart):
        raise TypeError(f"start must be a GaussianStart or None, but is {start!r}")
    if seeds is not None and len(seeds) != len(noise):
        raise ValueError(f"seeds must be one for each of the {len(noise)} samples, but there are {len(seeds)}")
    sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64).cpu())
    steps = intervals(sigmas.tolist(), len(noise), noise.device)
    if denoise_to_zero and sigmas[-1] > 0:
        last, zero = steps[-1].sigma_next, shared(0.0, len(noise), noise.device)
        steps.append(Interval(last, zero, index=len(steps), total=len(steps), to_zero=True))
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if isinstance(thresholding, str):
        thresholding = choose("thresholding", thresholding, THRESHOLDING)
    denoiser = as_denoiser(denoiser)
    if guidance is not None:
        _check_guided(denoiser, start)
    denoiser.check_condition(cond, len(noise))

    stream = None
    if solver.brownian:
        stream = BrownianNoise(range(len(noise)) if seeds is None else seeds, noise.shape[1:])
    elif solver.stochastic:
        stream = SampleNoise(range(len(noise)) if seeds is None else seeds, noise.shape[1:])
        stream.draw()  # what `seeded_noise` gives for the same seeds: the start must not come again as a step's noise
    keep = torch.is_grad_enabled() and noise.requires_grad
    with torch.set_grad_enabled(keep), feature_tap(denoiser, solver) as features:
        if start is None:
            # Half precision does not hold the level at which noise alone stands: there the state is in float32.
            held = 16 * sigmas[0].item() < torch.finfo(noise.dtype).max
            x, history = (noise if held else noise.float()) * sigmas[0].item(), ()
        else:
            x, history = start.begin(denoiser, noise, sigmas, cond, memory=solver.memory)
        points = [x]
        gaussian = None if start is None else start.denoiser(denoiser)
        flow = ProbabilityFlow(
            denoiser, cond, thresholding=thresholding, features=features, gaussian=gaussian, guidance=guidance
        )
        for x_next in integrate(flow, x, solver, steps, stream, history):
            x = x_next
            if return_trajectory:
                points.append(x)
    return Trajectory(torch.stack(points), sigmas, flow.nfe) if return_trajectory else x.to(noise.dtype)


def _check_guided(denoiser: Callable[..., Tensor], start: GaussianStart | None) -> None:
    """Raise `ValueError` unless the denoiser takes a guidance weight with every call."""
    if start is not None:
        raise ValueError("an analytic start has one guidance weight: leave out guidance or start")
    call = getattr(denoiser, "function", denoiser)  # what `as_denoiser` wraps
    asked = call.forward if isinstance(call, nn.Module) else call
    if "w" not in inspect.signature(asked).parameters:
        name = getattr(call, "__name__", type(call).__name__)
        raise ValueError(
            f"guidance needs a denoiser that takes w with every call, but {name} does not: "
            "give a student that was distilled for w, or guided(denoiser, 0)"
        )
