"""Image-to-image: noise up to some level, then the rest of the schedule (Meng et al. 2022, SDEdit)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import as_denoiser
from diffdistill.solvers import ProbabilityFlow, SampleNoise, Solver, intervals
from diffdistill.solvers.features import feature_tap
from diffdistill.solvers.schedules import check_sigmas


@dataclass(frozen=True, eq=False)
class Start:
    """The state that an edit begins with, `x: [B, ...]`, and the levels that are left, beginning at its own."""

    x: Tensor
    sigmas: Tensor


def levels_left(sigmas: Tensor, strength: float) -> Tensor:
    """The end of a schedule `[num_steps + 1]` that an edit of this strength goes through: 1 is all of it, 0 none.

    As in the pipelines of diffusers, `int(strength * num_steps)` steps are left to do. Where that is none, only the
    last level is; a strength above 0 that is too low for one step is warned of.

    Raises:
        ValueError: a strength outside [0, 1], or levels that do not decrease.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], but is {strength}")
    sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64).cpu())
    num_steps = len(sigmas) - 1
    left = int(num_steps * strength)
    if strength and not left:
        warnings.warn(f"strength {strength:g} leaves none of {num_steps} steps: nothing is changed", stacklevel=2)
    return sigmas[num_steps - left :]


def noised(x0: Tensor, sigmas: Tensor, strength: float, noise: Tensor) -> Start:
    """`x0 + sigma noise` at the first of the levels that `strength` leaves; for no steps, `x0` itself.

    Raises:
        ValueError: as `levels_left`, or noise of another shape.
    """
    levels = levels_left(sigmas, strength)
    if noise.shape != x0.shape:
        raise ValueError(f"the noise has shape {list(noise.shape)}, but the image {list(x0.shape)}")
    return Start(x0 + float(levels[0]) * noise if len(levels) > 1 else x0, levels)


@torch.no_grad()
def image_to_image(
    denoiser: Callable[..., Tensor],
    x0: Tensor,
    noise: Tensor,
    *,
    strength: float,
    solver: Solver,
    sigmas: Tensor,
    cond: Any = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Noise images as far as `strength` says, and denoise them under `cond`.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`.
        x0: images or latents `[B, ...]`.
        noise: standard normal, in the shape of `x0`.
        strength: from 0, which returns `x0`, to 1, which begins at the first level.
        solver: from `make_solver`.
        sigmas: the whole schedule.
        cond: the condition that the images shall have.
        seeds: one per sample, for stochastic solvers, by default 0 .. B - 1.

    Returns:
        Images or latents `[B, ...]`.

    Raises:
        ValueError: as `noised`, or a condition that the denoiser does not take.
    """
    start = noised(x0, sigmas, strength, noise)
    if len(start.sigmas) == 1:
        return start.x
    return run(denoiser, start, solver, cond, seeds)


def run(
    denoiser: Callable[..., Tensor],
    start: Start,
    solver: Solver,
    cond: Any = None,
    seeds: Sequence[int] | None = None,
    between: Callable[[Tensor, float], Tensor] = lambda x, sigma: x,
    repeats: int = 1,
) -> Tensor:
    """Carry a state along its levels; `between` may change it after each step, given the level that was reached.

    Every step is taken `repeats` times: before each time but the first, noise leads back to where the step began.
    """
    denoiser = as_denoiser(denoiser)
    denoiser.check_condition(cond, len(start.x))
    x, levels = start.x, start.sigmas.tolist()
    stream = SampleNoise(range(len(x)) if seeds is None else seeds, x.shape[1:])
    stream.draw()  # what `seeded_noise` gives for the same seeds must not come again
    history: Any = ()
    with feature_tap(denoiser, solver) as features:
        flow = ProbabilityFlow(denoiser, cond, features=features)
        steps = intervals(start.sigmas, len(x), x.device)
        for interval, level, level_next in zip(steps, levels, levels[1:], strict=False):
            past = history
            for time in range(repeats):
                if time:
                    back = (level**2 - level_next**2) ** 0.5
                    x = x + back * stream.draw(dtype=x.dtype, device=x.device)
                draw = stream.draw(dtype=x.dtype, device=x.device) if solver.stochastic else None
                x, history = solver.step(flow, x, interval, past, noise=draw)
                x = between(x, level_next)
    return x
