"""DEIS: exponential integrators that fit a polynomial to the noise (Zhang and Chen 2023, DEIS, Sections 3-4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.levels import Level, plain
from diffdistill.solvers.multistep import Multistep
from diffdistill.solvers.schedules import vp_betas
from diffdistill.solvers.step import AFS, Step, weighted_sum

# The VP process whose time tAB-DEIS interpolates in; the range is EDM's, whatever levels a schedule visits.
BETA_D, BETA_MIN = vp_betas(0.002, 80.0)


@cache
def _gauss_legendre(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], `[count, 1]` each."""
    rule = np.polynomial.legendre.leggauss(count)
    nodes, weights = (torch.from_numpy(values)[:, None].to(device) for values in rule)
    return nodes, weights


@dataclass(frozen=True)
class Quadrature:
    """The variable of the polynomial, as a function of sigma, and points that integrate it over a step."""

    variable: Callable[[Tensor], Tensor]
    points: int
    logarithmic: bool

    def rule(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Levels in the step and their weights, `[points, B]` each."""
        nodes, weights = _gauss_legendre(self.points, sigma.device)
        start, end = (sigma.log(), sigma_next.log()) if self.logarithmic else (sigma, sigma_next)
        half = (end - start) / 2
        levels = (start + end) / 2 + half * nodes
        if not self.logarithmic:
            return levels, half * weights
        levels = levels.exp()
        return levels, half * weights * levels


def _vp_time(sigma: Tensor) -> Tensor:
    return ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D


# Two points are exact for the cubics of "rhoab". In log sigma the time is analytic in a strip of width pi, so that 32
# points leave 1e-12 even where one step spans three decades.
MODES = {"tab": Quadrature(_vp_time, 32, True), "rhoab": Quadrature(lambda sigma: sigma, 2, False)}


def adams_weights(quadrature: Quadrature, sigma_next: Level, sigmas: Sequence[Level]) -> list[Level]:
    """Weights, `[B]` or numbers, that integrate over sigma the polynomial through values at `sigmas`, newest first.

    They are the integrals of Lagrange's basis polynomials (Zhang and Chen 2023, Eq. 15).
    """
    if len(sigmas) == 1:
        return [sigma_next - sigmas[0]]
    some = next((level for level in (sigma_next, *sigmas) if isinstance(level, Tensor)), None)
    if some is None:
        return list(_of_numbers(quadrature, (sigma_next, *sigmas)))
    return list(_of_tensors(quadrature, *(level + torch.zeros_like(some) for level in (sigma_next, *sigmas))).unbind())


@lru_cache(maxsize=1024)  # the batches of a run, and its repetitions, share their levels
def _of_numbers(quadrature: Quadrature, levels: tuple[float, ...]) -> list[float]:
    return _of_tensors(quadrature, *torch.tensor(levels, dtype=torch.float64)[:, None].unbind())[:, 0].tolist()


def _of_tensors(quadrature: Quadrature, sigma_next: Tensor, *sigmas: Tensor) -> Tensor:
    """The weights `[len(sigmas), B]`."""
    levels, weights = quadrature.rule(sigmas[0], sigma_next)
    nodes = quadrature.variable(torch.stack(sigmas))
    gaps = quadrature.variable(levels) - nodes[:, None]  # [nodes, points, B]
    diagonal = torch.eye(len(sigmas), dtype=torch.bool, device=nodes.device)[:, :, None]
    between = (nodes[:, None] - nodes).masked_fill(diagonal, 1.0)
    factors = (gaps / between[:, :, None]).masked_fill(diagonal[:, :, None], 1.0)  # [basis, nodes, points, B]
    basis = weights
    for factor in factors.unbind(1):
        basis = basis * factor
    return basis.sum(1)


class DEIS(Multistep):
    """Adams-Bashforth with a polynomial in VP time ("tab") or in sigma ("rhoab"), integrated exactly.

    Args:
        order: 1 to 4, the evaluations of a step, the current one included.
        mode: "tab" or "rhoab".
        afs: analytical first step.
    """

    def __init__(self, *, order: int = 4, mode: Literal["tab", "rhoab"] = "tab", afs: AFS = False) -> None:
        super().__init__(order=order, afs=afs)
        self.quadrature = choose("mode", mode, MODES)

    def update(self, step: Step) -> Tensor:
        past = self.past(step)
        weights = adams_weights(self.quadrature, step.sigma_next, [plain(e.sigma) for e in past])
        return weighted_sum(step.x, None, weights, [e.eps for e in past], scale=step.correction.scale_dir)
