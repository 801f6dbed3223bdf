"""The order of convergence of every solver, with exact start-up, against a fine Runge-Kutta run."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdistill.models import GaussianMixture
from diffdistill.solvers import ProbabilityFlow, intervals, make_schedule
from tests.solvers.table import ROWS, Row

STEPS = (96, 192)
GRIDS = {"log": ("logsnr", {}), "uniform": ("polynomial", {"rho": 1.0})}


@cache
def mixture() -> GaussianMixture:
    means = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return GaussianMixture([0.5, 0.3, 0.2], means, [0.3, 0.2, 0.4])


@cache
def exact(schedule: str) -> tuple[Tensor, Tensor]:
    """A trajectory `[193, 3, 2, 3]` on the finest grid, and the grid: classical Runge-Kutta in log sigma."""
    name, options = GRIDS[schedule]
    sigmas = make_schedule(name, num_steps=STEPS[-1], sigma_min=0.5, sigma_max=4.0, **options)
    x = 4.0 * torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def slope(x: Tensor, u: float) -> Tensor:
        return x - mixture()(x, torch.full((3,), float(np.exp(u)), dtype=torch.float64))

    points = [x]
    for start, end in zip(sigmas.log().tolist(), sigmas.log().tolist()[1:], strict=False):
        h = (end - start) / 3
        for u in start + h * np.arange(3):
            k1 = slope(x, u)
            k2 = slope(x + h / 2 * k1, u + h / 2)
            k3 = slope(x + h / 2 * k2, u + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, u + h))
        points.append(x)
    return torch.stack(points), sigmas


@torch.no_grad()
def error(row: Row, num_steps: int, encoding: bool = False) -> float:
    """Distance to the exact end point; `encoding` runs the trajectory from its end, with sigma increasing."""
    solver = row.solver(**row.deterministic)
    points, sigmas = (v[:: STEPS[-1] // num_steps] for v in exact(row.schedule))
    if encoding:
        points, sigmas = points.flip(0), sigmas.flip(0)
    steps = intervals(sigmas, 3)
    flow = ProbabilityFlow(mixture())
    history = tuple(flow(points[k], steps[k].sigma) for k in range(solver.memory))
    x = points[solver.memory]
    for interval in steps[solver.memory :]:
        x, history = solver.step(flow, x, interval, history, noise=torch.zeros_like(x))
    assert flow.nfe == solver.memory + row.evaluations * (num_steps - solver.memory)
    return (x - points[-1]).norm().item()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_order(row: Row):
    coarse, fine = (error(row, n) for n in STEPS)
    assert np.log2(coarse / fine) == pytest.approx(row.order, abs=0.15)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.solver().stochastic], ids=str)
def test_order_of_encoding(row: Row):
    coarse, fine = (error(row, n, encoding=True) for n in STEPS)
    assert np.log2(coarse / fine) == pytest.approx(row.order, abs=0.15)
