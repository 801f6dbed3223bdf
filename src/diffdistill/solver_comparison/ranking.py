"""Solvers side by side: distance to the end of the exact trajectory against network evaluations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.files.atomic import write_text
from diffdistill.files.hashes import sha256
from diffdistill.learned.storage import PREDICTOR
from diffdistill.reports.progress import progress
from diffdistill.solver_comparison.candidates import Candidate, Grid, learned_candidate, predictor_name
from diffdistill.solver_comparison.problem import Problem


@dataclass(frozen=True)
class Measurement:
    """One way to sample, measured on all seeds.

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


def measure_candidate(
    candidate: Candidate, problem: Problem, frechet: Callable[[Tensor], float] | None = None
) -> tuple[Measurement, Tensor]:
    """Run a candidate on all seeds; the measurement, and the distance of each sample to the reference, `[N]`."""
    started, parts, nfe = time.perf_counter(), [], 0
    for noise, cond in problem.batches():
        x, nfe = candidate.run(problem.denoiser, noise, cond)
        parts.append(x.cpu())
    seconds = time.perf_counter() - started
    x = torch.cat(parts)
    distances = (x - problem.endpoints[int(candidate.sigmas[-1] == 0)]).flatten(1).norm(dim=1)
    row = Measurement(
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
        errors = {candidate: measure_candidate(candidate, part)[0].error for candidate in candidates}
        ranked = sorted(errors, key=lambda candidate: (isnan(errors[candidate]), errors[candidate]))
        candidates = ranked[: ceil(len(ranked) / 4)]
    return candidates[0] if candidates else None


Entry = tuple[str, Callable[[], Candidate | None]]
"""A name, and a function that finds the best candidate, or None if there is none."""


def entries(
    grid: Grid,
    solvers: Mapping[str, Mapping[str, Any]],
    bases: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[int],
    predictors: Sequence[str],
    problem: Problem,
    *,
    tuning_samples: int,
) -> Iterator[Entry]:
    """All candidates: every solver at every number of evaluations, with and without start, bases, learned solvers.

    Args:
        grid: what each solver is tried with.
        solvers: options of `make_solver` by label.
        bases: options of `Grid.base` by label: `solver` and `schedule`.
        evaluations: of the denoiser.
        predictors: what `load_predictor` takes.
        problem: its first `tuning_samples` seeds choose the best of the grid.
        tuning_samples: their number.
    """
    few = problem.part(tuning_samples)

    def choose(label: str, count: int, started: bool) -> Candidate | None:
        return best(grid.candidates(label, solvers[label], count, few, started=started), few)

    for label in solvers:
        for count in evaluations:
            for started in (False, True) if grid.starts else (False,):
                yield f"{label}_{count}{'_start' if started else ''}", partial(choose, label, count, started)
    for label, base in bases.items():
        for count in evaluations:
            yield f"{label}_{count}", partial(grid.base, label, evaluations=count, problem=few, **base)
    for name in predictors:
        row = f"learned_{predictor_name(name)}_{sha256(PREDICTOR.find(name))[:8]}"
        yield row, partial(learned_candidate, name, problem.denoiser)


def compare(
    candidates: Iterable[Entry], problem: Problem, folder: Path, frechet: Callable[[Tensor], float] | None = None
) -> list[Measurement]:
    """Measure every entry, in the order of evaluations; each measurement is a file of `folder`, made once."""
    rows = []
    for name, choose in progress(list(candidates), desc="solvers"):
        path = folder / f"{name}.json"
        if not path.exists():
            candidate = choose()
            row = None if candidate is None else measure_candidate(candidate, problem, frechet)[0]
            write_text(path, json.dumps(row and asdict(row)) + "\n")
        if row := json.loads(path.read_text(encoding="utf-8")):
            rows.append(Measurement(**row))
    return sorted(rows, key=lambda row: (row.nfe, row.solver, row.start is not None))
