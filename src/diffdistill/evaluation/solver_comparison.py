"""Solvers on one denoiser, side by side: distance to the end of the exact trajectory against network evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, isnan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.atomic import replacing
from diffdistill.devices import device_of
from diffdistill.solvers import (
    GaussianStart,
    GaussianStatistics,
    Solver,
    make_schedule,
    make_solver,
    sample,
    seeded_noise,
)


@dataclass(frozen=True, eq=False)
class Problem:
    """What every solver is given: a denoiser, seeds and labels, and the end points to reach.

    Attributes:
        denoiser: callable `(x, sigma, cond) -> x0` with `data_shape`, `sigma_min` and `sigma_max`.
        seeds: of the starting noise.
        labels: long `[N]`, or None.
        endpoints: `[2, N, ...]`, of the reference at sigma_min and at 0; see `reference_endpoints`.
        batch_size: of sampling.
    """

    denoiser: Any
    seeds: Sequence[int]
    labels: Tensor | None
    endpoints: Tensor
    batch_size: int = 250

    def part(self, count: int) -> Problem:
        """The first `count` seeds."""
        labels = None if self.labels is None else self.labels[:count]
        return Problem(self.denoiser, self.seeds[:count], labels, self.endpoints[:, :count], self.batch_size)

    def batches(self) -> list[tuple[Tensor, Tensor | None]]:
        """Noise and labels, in batches."""
        return batches(self.denoiser, self.seeds, self.labels, self.batch_size)


def batches(
    denoiser: Any, seeds: Sequence[int], labels: Tensor | None, batch_size: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Noise `[<= batch_size, ...]` and labels of all seeds, on the denoiser's device."""
    device, parts = device_of(denoiser), []
    for first in range(0, len(seeds), batch_size):
        chunk = slice(first, first + batch_size)
        noise = seeded_noise(seeds[chunk], denoiser.data_shape, device=device)
        parts.append((noise, None if labels is None else labels[chunk].to(device)))
    return parts


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to sample.

    Attributes:
        label: of the solver.
        solver, sigmas, start: as for `sample`.
        schedule: of the noise levels, in words.
        parameters: learned numbers.
        training_seconds: that learning took.
    """

    label: str
    solver: Solver
    sigmas: Tensor
    start: GaussianStart | None = None
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
            return_trajectory=True,
        )
        return run.x[-1], run.nfe


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        solver: its label.
        nfe: network evaluations of one sample, as counted; a guided evaluation counts twice.
        start: the level that the analytic start begins at, None without it.
        schedule: of the noise levels, in words.
        error: mean L2 distance to the reference's end points.
        frechet: Fréchet distance, or None where none was asked for.
        milliseconds: wall time of one sample.
        parameters: learned numbers.
        training_seconds: that learning took.
    """

    solver: str
    nfe: int
    start: float | None
    schedule: str
    error: float
    frechet: float | None
    milliseconds: float
    parameters: int = 0
    training_seconds: float | None = None


def reference_endpoints(
    denoiser: Any,
    seeds: Sequence[int],
    labels: Tensor | None,
    *,
    solver: Solver,
    num_steps: int,
    folder: Path,
    batch_size: int = 250,
) -> Tensor:
    """End points `[2, N, ...]` at sigma_min and at 0 of a fine run.

    Batches that lie in `folder` are not run again, nor where `seeds` are fewer than those that they were made for.
    """
    levels = make_schedule(
        "polynomial", num_steps=num_steps, sigma_min=denoiser.sigma_min, sigma_max=denoiser.sigma_max
    )
    parts = []
    todo = batches(denoiser, seeds, labels, batch_size)
    for index, (noise, cond) in enumerate(tqdm(todo, desc="reference", unit="batch", disable=None)):
        path = folder / f"{index:05d}.safetensors"
        known = load_file(path)["endpoints"] if path.exists() else noise[:0].expand(2, *noise[:0].shape)
        if known.shape[1] < len(noise):
            run = sample(
                denoiser,
                noise,
                solver=solver,
                sigmas=levels,
                cond=cond,
                denoise_to_zero=True,
                return_trajectory=True,
            )
            known = run.x[-2:].cpu().contiguous()
            with replacing(path) as temporary:
                save_file({"endpoints": known}, temporary)
        parts.append(known[:, : len(noise)])
    return torch.cat(parts, dim=1)


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
    """What a solver is tried with.

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
                        found.append(Candidate(label, solver, sigmas, begin, name + suffix))
        return found

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


def measure(
    candidate: Candidate, problem: Problem, frechet: Callable[[Tensor], float] | None = None
) -> tuple[Row, Tensor]:
    """Run a candidate on all seeds; the row, and the distance of each sample to the reference, `[N]`."""
    started, parts, nfe = time.perf_counter(), [], 0
    for noise, cond in problem.batches():
        x, nfe = candidate.run(problem.denoiser, noise, cond)
        parts.append(x.cpu())
    seconds = time.perf_counter() - started
    x = torch.cat(parts)
    distances = (x - problem.endpoints[int(candidate.sigmas[-1] == 0)]).flatten(1).norm(dim=1)
    row = Row(
        solver=candidate.label,
        nfe=nfe,
        start=None if candidate.start is None else candidate.start.sigma,
        schedule=candidate.schedule,
        error=float(distances.mean()),
        frechet=None if frechet is None else frechet(x),
        milliseconds=1000 * seconds / len(x),
        parameters=candidate.parameters,
        training_seconds=candidate.training_seconds,
    )
    return row, distances


def best(candidates: Sequence[Candidate], problem: Problem) -> Candidate | None:
    """The candidate of least mean distance to the reference; None if there are none.

    All are tried on a sixteenth of the seeds, the better quarter of them on a quarter, and the best of those on all.
    """
    for share in (16, 4, 1):
        part = problem.part(max(len(problem.seeds) // share, 2))
        errors = {candidate: measure(candidate, part)[0].error for candidate in candidates}
        ranked = sorted(errors, key=lambda candidate: (isnan(errors[candidate]), errors[candidate]))
        candidates = ranked[: ceil(len(ranked) / 4)]
    return candidates[0] if candidates else None
