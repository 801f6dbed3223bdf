"""The x0 that a few-step student regresses, for every method of this room.

A hop is an Euler step from sigma to s with a denoised sample A: `A + (s / sigma) (x - A)`. Two hops, sigma to sigma'
with A, made at x, and sigma' to s with B, made where the first hop ends, end where one hop with

    x0* = kappa A + (1 - kappa) B,      kappa = s (sigma - sigma') / (sigma' (sigma - s))

would: insert them into the inverse of a hop, and x cancels. Methods differ in who answers A and B, and in where the
hops end; in the limit of sigma' = sigma the difference of A and B becomes a derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers import Euler, Interval, ProbabilityFlow, Solver
from diffdistill.training.forward_mode import forward_derivative

NORM_OFFSET = 0.1
"""The c of tangent normalisation, `g / (||g|| + c)` (Lu and Song 2024, Section 4.1)."""


@torch.no_grad()
def two_hop_target(
    first: ProbabilityFlow,
    second: ProbabilityFlow,
    x: Tensor,
    sigma: Tensor,
    sigma_mid: Tensor,
    sigma_next: Tensor,
    *,
    solver: Solver | None = None,
) -> Tensor:
    """The x0 for which one Euler step ends where two hops end, `[B, ...]`.

    Args:
        first: answers at `x: [B, ...]` and `sigma: [B]`.
        second: answers where the first hop ends; its answer is unused where that is `sigma_next` already.
        x: the state at sigma.
        sigma: where the hops begin, `[B]`.
        sigma_mid: where they meet, `[B]`.
        sigma_next: where they end, `[B]`.
        solver: takes the first hop, by default Euler's method; it must need no past.
    """
    euler = Euler()
    x_mid, _ = (solver or euler).step(first, x, Interval(sigma, sigma_mid))
    arrived = sigma_mid == sigma_next
    # Who has arrived hops from a level where the answer is finite, which may not be so at 0, and hops in vain.
    x_next, _ = euler.step(second, x_mid, Interval(torch.where(arrived, sigma, sigma_mid), sigma_next))
    x_next = torch.where(per_sample(arrived, x).bool(), x_mid, x_next)
    return Euler.invert(x, x_next, Interval(sigma, sigma_next))


def eulerian_target(
    teacher: Callable[[Tensor, Tensor, Any], Tensor],
    student: Callable[[Tensor, Tensor, Any], Tensor],
    x: Tensor,
    sigma: Tensor,
    s: Tensor,
    cond: Any,
    *,
    ramp: float,
) -> tuple[Tensor, Tensor]:
    """The limit of two hops of vanishing first length: A of the teacher, B of the student.

        x0* = (1 - rho) D_T + rho (D - dD / dln sigma),    rho = ramp (1 - s / sigma)

    with the derivative along the teacher's direction: x moves by x - D_T, sigma by sigma. At ramp = 0 that is stage 1,
    at ramp = 1 and s = 0 the continuous consistency model (Lu and Song 2024), at any s the flow map of Sabour et al.
    2025 (AYF-EMD) in terms of x0. `D - x0*` is zero for an exact flow map, for every s and ramp.

    Args:
        teacher: `(x, sigma, cond) -> D_T`.
        student: `(x, sigma, cond) -> D` for steps that end at `s`.
        x: `[B, ...]`.
        sigma: where the steps begin, `[B]`.
        s: where they end, `[B]`.
        cond: the condition.
        ramp: how much of the derivative counts, from 0 to 1.

    Returns:
        The student's answer D, and the target, both without a graph.
    """
    with torch.no_grad():
        known = teacher(x, sigma, cond)
    denoised, slope = forward_derivative(lambda x, sigma: student(x, sigma, cond), (x, sigma), (x - known, sigma))
    rho = per_sample(ramp * (1 - s / sigma), x)
    return denoised, (1 - rho) * known + rho * (denoised - slope)


def lagrangian_target(
    teacher: Callable[[Tensor, Tensor, Any], Tensor],
    student: Callable[[Tensor, Tensor, Any, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    s: Tensor,
    cond: Any,
) -> tuple[Tensor, Tensor]:
    """The target in which the end of the step moves, and the teacher is asked where the student arrives.

        x0* = D_T(f, s) + (1 - s / sigma) dD / dln s,    f = D + (s / sigma) (x - D)

    It says `s df/ds = f - D_T(f, s)`, that the student's end moves along the teacher's flow (Sabour et al. 2025,
    AYF-LMD, in terms of x0). The derivative is one in a number per sample, and x is not moved. `s` must be positive. A
    student that ignores s has no derivative: so it begins without a warm-up.

    Arguments and results are those of `eulerian_target`, but for `student`: `(x, sigma, cond, s) -> D`.
    """
    denoised, slope = forward_derivative(lambda s: student(x, sigma, cond, s), (s,), (s,))
    ratio = s / sigma
    with torch.no_grad():
        end = denoised + per_sample(ratio, x) * (x - denoised)
        known = teacher(end, s, cond)
    return denoised, known + per_sample(1 - ratio, x) * slope


def normalised(denoised: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The target moved towards `denoised`: the step to it then is shorter than 1, in units of the weighted error.

    `g = sqrt(omega) (D - x0*)` becomes `g / (||g|| + 0.1)`, for each sample by itself. With the weight "edm" g is the
    tangent of Lu and Song 2024 in the network's own units, `1 / sqrt(omega) = c_out`.
    """
    scale = per_sample(weight.sqrt(), denoised)
    tangent = scale * (denoised - target)
    length = per_sample(tangent.flatten(1).norm(dim=1), denoised)
    return denoised - tangent / (scale * (length + NORM_OFFSET))
