"""GITS: the schedule on which Euler steps stay closest to a teacher's trajectories (Chen et al. 2024, ICML)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.base import Solver
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.ipndm import IPNDM
from diffdistill.solvers.schedules import check_num_steps, polynomial
from diffdistill.solvers.start import GaussianStart
from diffdistill.solvers.step import History, intervals

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


def _deviation(x: Tensor, trajectory: Tensor) -> Tensor:
    """Distance `[..., B]` of points `[..., B, D]` from the chord of each trajectory `[points, B, D]`."""
    end = trajectory[-1]
    chord = end - trajectory[0]
    direction = chord / chord.norm(dim=-1, keepdim=True)
    offset = end - x
    return (offset - (offset * direction).sum(-1, keepdim=True) * direction).norm(dim=-1)


def _added_deviation(jump: Tensor, target: Tensor, trajectory: Tensor) -> Tensor:
    return _deviation(jump, trajectory) - _deviation(target, trajectory)


METRICS: dict[str, Metric] = {
    "dev": _added_deviation,
    "l1": lambda jump, target, trajectory: (jump - target).abs().sum(-1),
    "l2": lambda jump, target, trajectory: (jump - target).norm(dim=-1),
}


@torch.no_grad()
def gits(
    *,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    cond: Any = None,
    metric: Literal["dev", "l1", "l2"] = "dev",
    coefficient: float = 1.15,
    fine_steps: int = 60,
    rho: float = 7.0,
    start: GaussianStart | None = None,
) -> Tensor:
    """Choose `num_steps + 1` of the levels of a fine polynomial schedule by dynamic programming.

    The teacher is iPNDM of order 4 on the fine schedule. The paper uses 256 trajectories.

    Args:
        num_steps: steps of the result.
        sigma_min: last level.
        sigma_max: first level.
        denoiser: any callable `(x, sigma, cond) -> x0`.
        noise: standard normal, `[B, ...]`, one trajectory for each row.
        cond: the condition, such as class labels `[B]`.
        metric: cost of an Euler jump from one teacher point to the level of another: its added deviation from the
            trajectory's chord ("dev"), or its distance to the teacher's point ("l1", "l2"), averaged over the batch.
        coefficient: weight of a later step against the one before it.
        fine_steps: steps of the teacher.
        rho: of the fine schedule.
        start: the analytic start whose runs the schedule is for; `sigma_max` is then its sigma.

    Raises:
        ValueError: an unknown metric, or more steps than the teacher takes.
    """
    measure, solver = choose("metric", metric, METRICS), IPNDM(order=4)
    check_num_steps(num_steps)
    if num_steps > fine_steps:
        raise ValueError(f"num_steps must be at most fine_steps = {fine_steps}, but is {num_steps}")
    sigmas = polynomial(num_steps=fine_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    if start is None:
        x, history = noise * sigmas[0].item(), ()
    else:
        x, history = start.begin(denoiser, noise, sigmas, cond, memory=solver.memory)
    points, slopes = _teacher(ProbabilityFlow(denoiser, cond), x, sigmas, solver, history)
    cost = torch.full((fine_steps + 1, fine_steps + 1), torch.inf, dtype=torch.float64)
    for i in range(fine_steps):
        lengths = (sigmas[i + 1 :] - sigmas[i]).to(points.device, points.dtype)
        jumps = points[i] + lengths[:, None, None] * slopes[i]
        cost[i, i + 1 :] = measure(jumps, points[i + 1 :], points).mean(1).double().cpu()
    return sigmas[shortest_path(cost, num_steps, coefficient)]


def _teacher(
    flow: ProbabilityFlow, x: Tensor, sigmas: Tensor, solver: Solver, history: History
) -> tuple[Tensor, Tensor]:
    """Points `[len(sigmas), B, D]` of the trajectories and the slopes `[len(sigmas) - 1, B, D]` there."""
    points, slopes = [x], []
    for interval in intervals(sigmas.tolist(), len(x), x.device):
        evaluation = solver.evaluate(flow, x, interval)
        slopes.append(evaluation.eps)
        x, history = solver.step(flow, x, interval, history, evaluation=evaluation)
        points.append(x)
    return torch.stack(points).flatten(2), torch.stack(slopes).flatten(2)


def shortest_path(cost: Tensor, num_steps: int, coefficient: float = 1.0) -> list[int]:
    """The `num_steps + 1` increasing indices from first to last of least total cost.

    Step k from the start counts `coefficient**k` times its `cost[i, j]`, the cost of the step from i to j.
    """
    count = len(cost)
    later = [torch.where(torch.arange(count) == count - 1, 0.0, torch.inf).to(cost.dtype)]
    choice = []
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    for _ in range(num_steps):
        total = torch.where(upper, cost + coefficient * later[-1], torch.inf)
        best = total.min(dim=1)
        later.append(best.values)
        choice.append(best.indices)
    path = [0]
    for indices in reversed(choice):
        path.append(int(indices[path[-1]]))
    return path
