"""The ways to use a solver: schedules, an analytical first step, a level to start at; and learned solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill.learned import load_predictor
from diffdistill.registry import choose
from diffdistill.solver_comparison.problem import Problem
from diffdistill.solvers import GaussianStart, GaussianStatistics, Solver, make_schedule, make_solver, sample


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to sample.

    Attributes:
        label: of the solver.
        solver, sigmas, start, thresholding: as for `sample`.
        schedule: of the noise levels, in words.
        parameters: learned numbers.
        training_seconds: that learning took.
    """

    label: str
    solver: Solver
    sigmas: Tensor
    start: GaussianStart | None = None
    thresholding: str | None = None
    schedule: str = "own"
    parameters: int = 0
    training_seconds: float | None = None

    def run(self, denoiser: Any, noise: Tensor, cond: Tensor | None) -> tuple[Tensor, int]:
        """The sample, and the counted evaluations."""
        run = sample(
            denoiser,
            noise,
            solver=self.solver,
            sigmas=self.sigmas,
            cond=cond,
            start=self.start,
            thresholding=self.thresholding,
            return_trajectory=True,
        )
        return run.x[-1], run.nfe


def num_steps_for(solver: Solver, evaluations: int, *, to_zero: bool) -> int | None:
    """Steps for which a solver asks the denoiser that often, or None if there is no such number.

    Args:
        solver: the solver.
        evaluations: of the denoiser.
        to_zero: the schedule ends at 0, so that its last step is one evaluation.
    """
    stepped = evaluations + bool(solver.afs) - to_zero
    steps, rest = divmod(stepped, solver.stages)
    steps += to_zero
    return steps if rest == 0 and steps >= 1 and (stepped > 0 or not solver.afs) else None


@dataclass(frozen=True, eq=False)
class Grid:
    """The schedules, starts and first steps that a solver is tried with.

    Attributes:
        schedules: options of `make_schedule` by label; `sigma_min`, `sigma_max` and `num_steps` are filled in.
        statistics: for the analytic start, or None.
        starts: levels to start at, besides none.
        analytic_first_step: try an analytical first step, too: of the unit Gaussian without start, of the statistics
            with one.
    """

    schedules: Mapping[str, Mapping[str, Any]]
    statistics: GaussianStatistics | None = None
    starts: Sequence[float] = ()
    analytic_first_step: bool = False

    def candidates(
        self, label: str, options: Mapping[str, Any], evaluations: int, problem: Problem, *, started: bool
    ) -> list[Candidate]:
        """All ways to use the solver of `options` (of `make_solver`) for that many evaluations.

        Args:
            label: of the solver.
            options: of `make_solver`.
            evaluations: of the denoiser.
            problem: its denoiser and a few seeds.
            started: with analytic start.
        """
        first_steps: dict[str, Any] = {"": False}
        if self.analytic_first_step and "afs" not in options:
            first_steps[", afs"] = "gaussian" if started else True
        found = []
        for start in self.starts if started else (None,):
            for suffix, afs in first_steps.items():
                solver = make_solver(**{"afs": afs, **options})
                for name, schedule in self.schedules.items():
                    num_steps = num_steps_for(solver, evaluations, to_zero=schedule.get("sigma_min") == 0)
                    if num_steps is not None:
                        sigmas, begin = self._levels(name, num_steps, start, problem)
                        found.append(Candidate(label, solver, sigmas, begin, schedule=name + suffix))
        return found

    def base(
        self, label: str, solver: Mapping[str, Any], schedule: str, evaluations: int, problem: Problem
    ) -> Candidate | None:
        """The solver of `solver` (of `make_solver`) on the schedule of that label, or None for such evaluations.

        Raises:
            ValueError: a schedule that is not one of the grid.
        """
        made, options = make_solver(**solver), choose("schedule", schedule, self.schedules)
        num_steps = num_steps_for(made, evaluations, to_zero=options.get("sigma_min") == 0)
        if num_steps is None:
            return None
        return Candidate(label, made, self._levels(schedule, num_steps, None, problem)[0], schedule=schedule)

    @cache  # noqa: B019 (a grid lives as long as the comparison)
    def _levels(
        self, name: str, num_steps: int, start: float | None, problem: Problem
    ) -> tuple[Tensor, GaussianStart | None]:
        """A schedule by its label, and the start that it begins with; made once, as GITS runs trajectories for it."""
        denoiser, begin = problem.denoiser, None
        if start is not None:
            assert self.statistics is not None
            begin = GaussianStart(self.statistics, start)
        ends = {"sigma_min": denoiser.sigma_min, "sigma_max": start or denoiser.sigma_max}
        options: dict[str, Any] = {**ends, **self.schedules[name]}
        if options["name"] == "gits":
            ((noise, cond), *_) = problem.part(64).batches()
            options |= {"denoiser": denoiser, "noise": noise, "cond": cond, "start": begin}
        return make_schedule(**options, num_steps=num_steps), begin


def predictor_name(predictor: str) -> str:
    """The name of a predictor: that of its file, or of the run that it is the result of."""
    path = Path(predictor).absolute()
    return path.parent.name if path.stem == "predictor" else path.stem


def learned_candidate(predictor: str, denoiser: Any) -> Candidate:
    """A learned solver as it was trained, by what `load_predictor` takes.

    Raises:
        ValueError: it was trained for another denoiser.
    """
    learned = load_predictor(predictor)
    learned.check(denoiser)
    return Candidate(
        predictor_name(predictor).removesuffix(f"-{learned.nfe}nfe"),
        learned.solver,
        learned.sigmas,
        learned.gaussian_start(),
        learned.thresholding,
        schedule="learned",
        parameters=sum(p.numel() for p in learned.solver.predictor.parameters()),
        training_seconds=learned.provenance.get("metrics", {}).get("seconds"),
    )
