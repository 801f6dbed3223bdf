"""Encoding by the reversed ODE, and style transfer with it (Meng et al. 2023, Section 4; Su et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import as_denoiser
from diffdistill.editing.image_to_image import levels_left
from diffdistill.solvers import Euler, ProbabilityFlow, Solver, integrate, intervals, sample
from diffdistill.solvers.schedules import check_sigmas

LEVEL_TOLERANCE = 1e-6
"""Levels that are closer than this, relatively, are the same."""


def _reversible(solver: Solver, sigmas: Tensor) -> Tensor:
    """The levels in float64, if the ODE can be run both ways along them."""
    sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64).cpu())
    if sigmas[-1] == 0:
        raise ValueError("encoding begins at the last noise level, which must be positive: it is 0")
    if solver.stochastic:
        raise ValueError(f"{type(solver).__name__} is stochastic: encoding needs a solver of the ODE")
    if solver.afs:
        raise ValueError("an analytical first step is one from noise, and encoding begins with images: set afs=False")
    return sigmas


def levels_up_to(sigmas: Tensor, top: float) -> Tensor:
    """The levels at which to encode up to `top`: `top` itself, and those of a schedule that lie below it.

    Raises:
        ValueError: the schedule has no level below `top`, or ends before it.
    """
    below = sigmas[sigmas < top * (1 - LEVEL_TOLERANCE)]
    if not len(below) or top > float(sigmas[0]) * (1 + LEVEL_TOLERANCE):
        raise ValueError(
            f"cannot encode up to sigma = {top:g}: the levels of the encoder are {float(sigmas[-1]):g} to "
            f"{float(sigmas[0]):g}"
        )
    return torch.cat([sigmas.new_tensor([top]), below])


@torch.no_grad()
def encode(
    denoiser: Callable[..., Tensor],
    x0: Tensor,
    *,
    sigmas: Tensor,
    solver: Solver | None = None,
    cond: Any = None,
) -> Tensor:
    """Carry images to the noise that leads to them: the steps of `sample` with sigma increasing.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`; without guidance, or with a small weight, as guided flows
            separate images too fast to be undone.
        x0: images or latents `[B, ...]`, taken as the state at the last level.
        sigmas: the levels of the decoding, decreasing to a positive one.
        solver: a deterministic solver, Euler's by default (DDIM inversion).
        cond: the condition of the images.

    Returns:
        Noise `[B, ...]` of about unit variance: `sample(denoiser, noise, solver=..., sigmas=sigmas)` gives `x0` back,
        up to the error of the solver.

    Raises:
        ValueError: levels that do not decrease or end at 0, a stochastic solver or one with an analytical first step,
            or a condition that the denoiser does not take.
    """
    denoiser = as_denoiser(denoiser)
    denoiser.check_condition(cond, len(x0))
    solver = solver or Euler()
    sigmas = _reversible(solver, sigmas)
    flow, x = ProbabilityFlow(denoiser, cond), x0
    for x_next in integrate(flow, x0, solver, intervals(sigmas.flip(0), len(x0), x0.device)):
        x = x_next
    return x / float(sigmas[0])


def style_transfer(
    source: Callable[..., Tensor],
    target: Callable[..., Tensor],
    x0: Tensor,
    *,
    sigmas: Tensor,
    solver: Solver | None = None,
    source_cond: Any = None,
    target_cond: Any = None,
    strength: float = 1.0,
) -> Tensor:
    """Encode images with the denoiser of one domain and decode with that of another.

    Two classes or prompts of one model are two domains: give the same denoiser twice, `target` guided if wanted.
    A low strength keeps the layout: what an image shares with others of its size is only lost in the noise of high
    levels, and an image that is encoded up to a middle level keeps it as it is.

    Args:
        source: encodes.
        target: decodes.
        x0: images or latents of the source, `[B, ...]`.
        sigmas: as in `encode`.
        solver: as in `encode`.
        source_cond: the condition of the images as they are.
        target_cond: the condition that they shall have.
        strength: the share of the levels to encode through, from the last; 0 returns the images.

    Returns:
        Images or latents `[B, ...]`.

    Raises:
        ValueError: as `encode`, or a strength outside [0, 1].
    """
    solver, sigmas = solver or Euler(), levels_left(sigmas, strength)
    if len(sigmas) == 1:
        return x0
    noise = encode(source, x0, sigmas=sigmas, solver=solver, cond=source_cond)
    return sample(target, noise, solver=solver, sigmas=sigmas, cond=target_cond)
