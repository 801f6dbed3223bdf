"""GITS: the schedule on which Euler steps stay closest to a teacher's trajectories (Chen et al. 2024, ICML)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.base import Solver
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.gaussian.start import GaussianStart
from diffdistill.solvers.ipndm import IPNDM
from diffdistill.solvers.schedules import check_num_steps, polynomial
from diffdistill.solvers.step import History, Step, intervals

# Each maps the points [N + 1, B, D] of the teacher, the slopes [N, B, D] there and the signed lengths [N, N + 1] of
# Euler jumps from one level to another to the mean costs [N, N + 1] of these jumps.
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


def _added_deviation(points: Tensor, slopes: Tensor, lengths: Tensor) -> Tensor:
    """Distance from the chord of the trajectory after a jump, less that of the teacher's point."""
    end = points[-1]
    chord = end - points[0]
    direction = chord / chord.norm(dim=-1, keepdim=True)

    def across(v: Tensor) -> Tensor:
        return (v - (v * direction).sum(-1, keepdim=True) * direction).double()

    teacher = torch.stack([across(point - end).norm(dim=-1) for point in points])
    costs = []
    for point, slope, length in zip(points[:-1], slopes, lengths[:, :, None], strict=True):
        offset, turn = across(point - end), across(slope)
        # |offset + length turn|^2 for all lengths by three products of each trajectory: no jump is formed.
        squares = offset.square().sum(-1) + length * (2 * (offset * turn).sum(-1) + length * turn.square().sum(-1))
        costs.append((squares.clamp(min=0).sqrt() - teacher).mean(-1))
    return torch.stack(costs)


def _distance(points: Tensor, slopes: Tensor, lengths: Tensor, *, p: int) -> Tensor:
    """Distance of a jump from the teacher's point."""
    cost = torch.full_like(lengths, torch.inf)
    for i, slope in enumerate(slopes):
        jumps = points[i] + lengths[i, i + 1 :, None, None].to(points.dtype) * slope
        cost[i, i + 1 :] = (jumps - points[i + 1 :]).norm(p=p, dim=-1).mean(-1)
    return cost


METRICS: dict[str, Metric] = {
    "dev": _added_deviation,
    "l1": partial(_distance, p=1),
    "l2": partial(_distance, p=2),
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
    lengths = (sigmas - sigmas[:-1, None]).to(points.device)
    cost = torch.full((fine_steps + 1, fine_steps + 1), torch.inf, dtype=torch.float64)
    cost[:-1] = measure(points, slopes, lengths).cpu()
    return sigmas[shortest_path(cost, num_steps, coefficient)]


def _teacher(
    flow: ProbabilityFlow, x: Tensor, sigmas: Tensor, solver: Solver, history: History
) -> tuple[Tensor, Tensor]:
    """Points `[len(sigmas), B, D]` of the trajectories and the slopes `[len(sigmas) - 1, B, D]` there."""
    points, slopes = [x], []
    for interval in intervals(sigmas.tolist(), len(x), x.device):
        evaluation = solver.evaluate(Step(flow, x, interval, history))
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
