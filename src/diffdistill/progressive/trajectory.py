"""Distillation of trajectories: a student learns on its own points to return to the teacher's (Zhou et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.progressive.objective import bound
from diffdistill.solvers import Euler, ProbabilityFlow, Solver, intervals
from diffdistill.training.conditions import condition_of
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import choice, draw_w, randint, randn


class TrajectoryDistillation(Objective):
    """`sum_j | x_{j+1} - X_{j+1} |` over the steps of the student, each followed by an optimiser step of its own.

    The teacher runs once from noise, X_0, X_1, ... at the student's levels. The student takes Euler steps from its own
    last point, which no gradient passes, so that later steps learn to undo what is left of earlier ones. Data are not
    needed, but for conditions such as text. The error is the mean over pixels; the paper takes the sum.

    Args:
        teacher: the frozen model; it takes w where `w_range` is given.
        student: a copy of it, or a flow map, which is told where each step ends.
        grids: the student's levels, `[N + 1]`; of several, one for each batch is drawn (SFD-v).
        fine: for each of them the teacher's levels, `[N (M + 1) + 1]`: the same with M more in each interval.
        solver: the teacher's.
        afs: the first step is the analytical one, and costs nothing.
        w_range: the guidance weights to draw, one for each trajectory, or None for models that take none.

    Raises:
        ValueError: levels that do not belong together, or several grids for a student that is not told where steps end.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        grids: Sequence[Tensor],
        fine: Sequence[Tensor],
        solver: Solver,
        afs: bool = False,
        w_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        for levels, more in zip(grids, fine, strict=True):
            per_interval, rest = divmod(len(more) - 1, len(levels) - 1)
            if rest or not torch.allclose(more[:: max(per_interval, 1)], levels, rtol=1e-9, atol=1e-12):
                raise ValueError("the teacher's levels must be those of the student with the same number more between")
        if len(grids) > 1 and not getattr(student, "flow_map", False):
            raise ValueError("a student of several numbers of steps must take s: make it with models.flow_map_student")
        self.teacher = teacher.eval().requires_grad_(False)
        self.trained = student
        self.grids = [(levels.tolist(), more.tolist()) for levels, more in zip(grids, fine, strict=True)]
        self.solver, self.euler = solver, Euler(afs=afs)
        self.w_range = w_range

    def train(self, mode: bool = True) -> TrajectoryDistillation:
        """Keep dropout off, as in the other methods; the paper leaves it on."""
        super().train(False)
        return self

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[Loss]:
        """One loss for each of the student's steps; of `batch` the conditions are used, if it has any."""
        noise, cond = self.start(batch, generator)
        w = None if self.w_range is None else draw_w(self.w_range, len(noise), generator)
        levels, fine = self.grids[choice(len(self.grids), generator)]
        points = self.trajectory(
            ProbabilityFlow(bound(self.teacher, w), cond), noise * levels[0], fine, len(levels) - 1
        )
        x, told = noise * levels[0], getattr(self.trained, "flow_map", False)
        for j, (interval, target) in enumerate(zip(intervals(levels, len(x), x.device), points, strict=True)):
            flow = ProbabilityFlow(bound(self.trained, w, interval.sigma_next if told else None), cond)
            x, _ = self.euler.step(flow, x, interval)
            if flow.nfe:
                error = (x - target).abs().flatten(1).mean(1).mean()
                yield Loss(error, {f"loss_{j}": error})
            x = x.detach()

    def start(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Any]:
        """Noise in the shape of the data, and conditions: those of the data, or labels of all classes alike."""
        count = len(next(iter(batch.values())))
        shape = batch["x"].shape[1:] if "x" in batch else self.teacher.data_shape
        noise = randn((count, *shape), generator)
        if "x" not in batch and self.teacher.num_classes:
            return noise, randint(self.teacher.num_classes, (count,), generator)
        return noise, condition_of(batch, self.teacher)

    @torch.no_grad()
    def trajectory(self, flow: ProbabilityFlow, x: Tensor, fine: Sequence[float], num_steps: int) -> list[Tensor]:
        """Where the teacher is at the ends of the student's steps."""
        points, history, per_interval = [], (), (len(fine) - 1) // num_steps
        for i, interval in enumerate(intervals(fine, len(x), x.device)):
            x, history = self.solver.step(flow, x, interval, history)
            if (i + 1) % per_interval == 0:
                points.append(x)
        return points
