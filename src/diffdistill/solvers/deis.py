"""DEIS: exponential integrators that fit a polynomial to the noise (Zhang and Chen 2023, DEIS, Sections 3-4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.registry import choose
from diffdistill.solvers.base import Correction, Evaluation, History, Interval, weighted_sum
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.multistep import Multistep, adams_weights
from diffdistill.solvers.schedules import vp_betas

# The VP process whose time tAB-DEIS interpolates in; the range is EDM's, whatever levels a schedule visits.
BETA_D, BETA_MIN = vp_betas(0.002, 80.0)
QUADRATURE_POINTS = 32

NodesAndMoments = tuple[list[Tensor], list[Tensor]]


@cache
def _gauss_legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)
    return torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)


def _vp_time(sigma: Tensor) -> Tensor:
    return ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D


def _in_time(sigma_next: Tensor, sigmas: Sequence[Tensor]) -> NodesAndMoments:
    """Nodes in VP time. Gauss-Legendre in log sigma, in which the integrand is analytic in a wide strip."""
    nodes, moments = [_vp_time(sigma) for sigma in sigmas], [sigma_next - sigmas[0]]
    if len(nodes) == 1:
        return nodes, moments
    points, weights = (v.expand(len(sigma_next), -1) for v in _gauss_legendre(sigma_next.device))
    start, end = sigmas[0].log(), sigma_next.log()
    half = per_sample((end - start) / 2, points)
    sigma = torch.exp(per_sample((start + end) / 2, points) + half * points)
    time, product = _vp_time(sigma), half * weights * sigma
    for node in nodes[:-1]:
        product = product * (time - per_sample(node, time))
        moments.append(product.sum(1))
    return nodes, moments


def _in_sigma(sigma_next: Tensor, sigmas: Sequence[Tensor]) -> NodesAndMoments:
    """Nodes in sigma, in closed form: Adams-Bashforth for any steps."""
    h = sigma_next - sigmas[0]
    square = h * h
    moments = [h, square / 2]
    if len(sigmas) > 2:
        a = sigmas[1] - sigmas[0]
        moments.append(square * (h / 3 - a / 2))
        if len(sigmas) > 3:
            b = sigmas[2] - sigmas[0]
            moments.append(square * (square / 4 - (a + b) * h / 3 + a * b / 2))
    return list(sigmas), moments[: len(sigmas)]


MODES: dict[str, Callable[[Tensor, Sequence[Tensor]], NodesAndMoments]] = {"tab": _in_time, "rhoab": _in_sigma}


class DEIS(Multistep):
    """Adams-Bashforth with a polynomial in VP time ("tab") or in sigma ("rhoab"), integrated exactly.

    Args:
        order: 1 to 4, the evaluations of a step, the current one included.
        mode: "tab" or "rhoab".
        afs: analytical first step.
    """

    def __init__(self, *, order: int = 4, mode: Literal["tab", "rhoab"] = "tab", afs: bool = False) -> None:
        super().__init__(order=order, afs=afs)
        self.moments = choose("mode", mode, MODES)

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        past = self.newest(evaluation, history, self.order_at(interval, history))
        weights = adams_weights(*self.moments(interval.sigma_next, [e.sigma for e in past]))
        if correction is not None and correction.scale_dir is not None:
            weights = [w * correction.scale_dir for w in weights]
        return weighted_sum(evaluation.x, None, weights, [e.eps for e in past])
