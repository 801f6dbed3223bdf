"""Training a predictor step by step along the trajectory of a teacher (Zhou et al. 2024, Section 3.3, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.learned.draws import draw_start
from diffdistill.learned.forward_mode import forward_mode_error
from diffdistill.models.acceleration import Compiled
from diffdistill.solvers import AMEDPlugin, Correction, Evaluation, Interval, ProbabilityFlow, Solver, Step, intervals
from diffdistill.solvers.features import feature_tap
from diffdistill.training import Loss, Objective


class StepwiseDistillation(Objective):
    """`sum_i || step_i(x_i) - teacher's x_{i+1} ||^2`, one optimiser step per step of the solver.

    A single-step solver starts each step from the teacher's point, where the teacher's own evaluation is used again; a
    multistep one goes on from where it arrived.

    Args:
        denoiser: the model that is sampled, guided or not; frozen.
        solver: the solver to train, an `AMEDPlugin` or `AMED`.
        sigmas: its schedule, `[N + 1]`, which does not end at 0.
        teacher: the solver that makes the trajectories.
        teacher_sigmas: its schedule, `[N (M + 1) + 1]`: `sigmas` with M points more in each interval.
        reuse: use the teacher's evaluations again where the solver starts from the teacher's points.
        together: all steps in one batch and one optimiser step; for single-step solvers. Not faster on a CPU.
        thresholding: of the teacher and of the solver, as for `ProbabilityFlow`.
        forward_mode: derivatives with respect to the predicted numbers in forward mode, with the memory of inference:
            on a CPU 1.3 (r, scale_dir) to 2 times (scale_time too) the time, for 0.3 % of the memory.

    Raises:
        ValueError: schedules that do not belong together, or `together` for a multistep solver.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: AMEDPlugin,
        *,
        sigmas: Tensor,
        teacher: Solver,
        teacher_sigmas: Tensor,
        reuse: bool = True,
        together: bool = False,
        forward_mode: bool = False,
        thresholding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        per_interval, rest = divmod(len(teacher_sigmas) - 1, len(sigmas) - 1)
        if rest or not torch.allclose(teacher_sigmas[:: max(per_interval, 1)], sigmas, rtol=1e-9, atol=0):
            raise ValueError("the teacher's schedule must be that of the solver with M points more in each interval")
        if sigmas[-1] <= 0:
            raise ValueError("the schedule to train on must end above 0: the step to 0 has nothing to learn")
        if together and solver.memory:
            raise ValueError(
                f"together=True needs a single-step solver, but {type(solver.inner).__name__} is multistep"
            )
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.solver = solver
        self.trained = solver.predictor
        self.teacher = teacher
        self.sigmas, self.teacher_sigmas = sigmas.tolist(), teacher_sigmas.tolist()
        self.per_interval = per_interval
        self.reuse, self.together, self.forward_mode = reuse, together, forward_mode
        self.thresholding = thresholding
        self.reached: list[Tensor] = []

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile the denoiser in the form that hands its bottleneck on."""
        self.denoiser = Compiled(self.denoiser, backend=backend)

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[Loss]:
        """One loss per step of the solver; `batch` is as `draw_start` takes it."""
        noise, cond = draw_start(self.denoiser, batch, generator)
        with feature_tap(self.denoiser, self.solver) as features:
            flow = self._flow(cond, features)
            points, evaluations = self.trajectory(flow, noise * self.sigmas[0])
            yield from (self._together if self.together else self._in_turn)(flow, points, evaluations)

    def _flow(self, cond: Any, features: Callable[[], Tensor | None] | None = None) -> ProbabilityFlow:
        return ProbabilityFlow(self.denoiser, cond, thresholding=self.thresholding, features=features)

    def diverged_at(self) -> int:
        """The first step of the last batch whose error was not finite, from 0; with `together`, the last step."""
        errors = torch.stack(self.reached) if self.reached else torch.zeros(len(self.sigmas) - 1)
        bad = ~errors.isfinite()
        return int(bad.int().argmax()) if bad.any() else len(self.sigmas) - 2

    @torch.no_grad()
    def trajectory(self, flow: ProbabilityFlow, x: Tensor) -> tuple[list[Tensor], list[Evaluation]]:
        """The teacher's points at the N + 1 levels of the solver, and its evaluations at the first N of them."""
        points, evaluations, history = [x], [], ()
        for i, interval in enumerate(intervals(self.teacher_sigmas, len(x), x.device)):
            evaluation = flow(x, interval.sigma)
            if i % self.per_interval == 0:
                evaluations.append(evaluation)
            x, history = self.teacher.step(flow, x, interval, history, evaluation=evaluation)
            if (i + 1) % self.per_interval == 0:
                points.append(x)
        return points, evaluations

    def _in_turn(self, flow: ProbabilityFlow, points: list[Tensor], evaluations: list[Evaluation]) -> Iterator[Loss]:
        x, history = points[0], ()
        self.reached = []
        steps = intervals(self.sigmas, len(x), x.device)
        for i, (interval, target) in enumerate(zip(steps, points[1:], strict=True)):
            known = evaluations[i] if self.reuse and (i == 0 or not self.solver.memory) else None
            evaluation = self._start(flow, x, interval, known)
            correction = self.solver.predict(evaluation, interval)
            value, x_next, history = self._error(flow, target, interval, history, evaluation, correction)
            self.reached.append(value.detach())
            yield Loss(value, {f"loss_{i}": value, **_means(correction, i)})
            history = tuple(_detached(e) for e in history)
            x = x_next.detach() if self.solver.memory else target

    def _together(self, flow: ProbabilityFlow, points: list[Tensor], evaluations: list[Evaluation]) -> Iterator[Loss]:
        steps = intervals(self.sigmas, len(points[0]), points[0].device)
        starts = [
            self._start(flow, x, interval, known if self.reuse else None)
            for x, interval, known in zip(points[:-1], steps, evaluations, strict=True)
        ]
        corrections = [self.solver.predict(e, interval) for e, interval in zip(starts, steps, strict=True)]
        whole = Interval(
            torch.cat([s.sigma for s in steps]), torch.cat([s.sigma_next for s in steps]), index=1, total=2
        )
        start = Evaluation(torch.cat([e.x for e in starts]), whole.sigma, torch.cat([e.denoised for e in starts]))
        repeated = self._flow(_repeat(flow.cond, len(steps)))
        target, correction = torch.cat(points[1:]), _cat(corrections)
        value, _, _ = self._error(repeated, target, whole, (), start, correction)
        value = value * len(steps)
        logs = {name: mean for i, c in enumerate(corrections) for name, mean in _means(c, i).items()}
        yield Loss(value, logs)

    def _start(self, flow: ProbabilityFlow, x: Tensor, interval: Interval, known: Evaluation | None) -> Evaluation:
        if known is not None and not (self.solver.inner.afs and interval.index == 0):
            return known
        with torch.no_grad():
            return self.solver.inner.evaluate(Step(flow, x, interval))

    def _error(
        self,
        flow: ProbabilityFlow,
        target: Tensor,
        interval: Interval,
        history: tuple[Evaluation, ...],
        evaluation: Evaluation,
        correction: Correction,
    ) -> tuple[Tensor, Tensor, tuple[Evaluation, ...]]:
        """Mean over the batch of the squared distance to the target, the point reached, and the history."""

        def step(learned: Correction, flow: ProbabilityFlow = flow) -> tuple[Tensor, tuple[Evaluation, ...]]:
            return self.solver.step(flow, evaluation.x, interval, history, evaluation=evaluation, correction=learned)

        if self.forward_mode:
            return forward_mode_error(step, flow, correction, target)
        x_next, history = step(correction)
        return squared_distance(x_next, target).mean(), x_next, history


def squared_distance(x: Tensor, target: Tensor) -> Tensor:
    """`|| x - target ||^2` per sample, `[B]`."""
    return (x - target).square().flatten(1).sum(1)


def _detached(evaluation: Evaluation) -> Evaluation:
    return Evaluation(evaluation.x.detach(), evaluation.sigma.detach(), evaluation.denoised.detach())


def _means(correction: Correction, index: int) -> dict[str, Tensor]:
    return {f"{name}_{index}": v.detach().mean() for name, v in vars(correction).items() if v is not None}


def _cat(corrections: Sequence[Correction]) -> Correction:
    names = [name for name, value in vars(corrections[0]).items() if value is not None]
    return replace(Correction(), **{n: torch.cat([getattr(c, n) for c in corrections]) for n in names})


def _repeat(cond: Any, times: int) -> Any:
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: _repeat(value, times) for name, value in cond.items()}
    return torch.cat([cond] * times)
