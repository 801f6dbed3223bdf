"""Measuring a whole table, cell by cell: what is done stays done, what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import diffdistill.distributed as distributed
from diffdistill.errors import one_line
from diffdistill.files.atomic import write_text
from diffdistill.files.hashes import sha256
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.sources import reference_from
from diffdistill.reports.progress import progress
from diffdistill.tables.cells import CellEvaluator, Models, Result
from diffdistill.tables.tables import Cell, Need, Table, located


@dataclass(frozen=True)
class Failure:
    """What could not be done, and why, in one line."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True)
class Outcome:
    """A table with its results and the files that it still needs.

    Attributes:
        table: the table.
        folder: where it lies.
        results: by the slug of the cell.
        missing: files that cells wait for.
        failures: cells that could not be measured, and why.
    """

    table: Table
    folder: Path
    results: Mapping[str, Result]
    missing: tuple[Need, ...] = ()
    failures: tuple[Failure, ...] = ()

    def result(self, cell: Cell) -> Result | None:
        return self.results.get(cell.slug)


@dataclass
class Files:
    """Hashes of the files of a table. A file without a hash in the config gets one on first use, in `files.json`."""

    path: Path
    hashes: dict[str, str] = field(default_factory=dict)
    writes: bool = True

    def check(self, need: Need) -> str:
        """The SHA-256 of a file.

        Raises:
            ValueError: it is not the one that the config states, or that was met before.
        """
        if need.path not in self.hashes:
            self.hashes[need.path] = sha256(located(need.path))
            record = self.recorded()
            for expected, by in ((need.sha256, "the config"), (record.get(need.path), str(self.path))):
                if expected is not None and expected != self.hashes[need.path]:
                    raise ValueError(
                        f"{need.path} has SHA-256 {self.hashes[need.path][:16]}..., but {by} says {expected[:16]}...: "
                        "it is another file (for a file that was made anew, choose another out=)"
                    )
            if self.writes and distributed.rank() == 0 and need.path not in record and Path(need.path).exists():
                write_text(self.path, json.dumps({**record, need.path: self.hashes[need.path]}, indent=1) + "\n")
        return self.hashes[need.path]

    def recorded(self) -> dict[str, str]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


def known_results(table: Table, folder: Path, files: Files) -> tuple[dict[str, Result], dict[str, str]]:
    """What lies in `folder` of a table: the results that still hold, and the digests of the cells that can be measured.

    A result does not hold if the settings or the files of its cell have changed since.
    """
    results: dict[str, Result] = {}
    digests: dict[str, str] = {}
    for cell in table.cells():
        if cell.impossible or cell.missing:
            continue
        digests[cell.slug] = table.digest(cell, {need.path: files.check(need) for need in cell.needs})
        result = Result.read(folder / "cells" / f"{cell.slug}.json")
        if result is not None and result.digest == digests[cell.slug]:
            results[cell.slug] = result
    return results, digests


def missing_files(table: Table) -> tuple[Need, ...]:
    """Files that the cells of a table need and that are not there, each once."""
    return tuple({need.path: need for cell in table.cells() for need in cell.missing}.values())


def reproduce(
    table: Table,
    folder: Path,
    *,
    device: torch.device,
    batch_size: int = 256,
    save_samples: bool = False,
    again: bool = False,
    switches: Mapping[str, bool] | None = None,
    so_far: Callable[[Outcome], object] | None = None,
) -> Outcome:
    """Measure the cells of a table whose files are there and that were not measured before.

    Each cell's result is a file that appears whole or not at all, so an interrupted table continues at the cell where
    it stopped. A cell whose settings or files have changed since is measured again. Processes share every cell's
    samples.

    Args:
        table: the table.
        folder: where the cells lie, in `cells/`.
        device: where to compute.
        batch_size: of sampling.
        save_samples: keep the samples of each cell.
        again: measure all cells again.
        switches: those of `acceleration.accelerated`.
        so_far: called after each cell with what is known by then.

    Raises:
        ValueError, RuntimeError, OSError: no cell could be measured; this is the first error. What fails beside cells
            that can be measured, and files that are merely absent, are reported in the outcome.
    """
    models = Models(device)
    failures: list[tuple[Failure, Exception]] = []
    found, digests = known_results(table, folder, Files(folder / "files.json"))
    results = {} if again else found
    todo = [cell for cell in table.cells() if cell.slug in digests and cell.slug not in results]
    if distributed.rank() == 0:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        for leftover in (folder / "cells").glob(".*.tmp.*"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
    distributed.barrier()  # no process writes a cell before all have seen which there are
    if todo:
        features = make_features(table.features)
        reference = reference_from(table.reference, features, table.measures, device=device)
        evaluator = CellEvaluator(features, reference, models, batch_size, save_samples, switches or {})
        total, mine = len(todo) * table.num_samples, distributed.rank() == 0
        with progress(total=total, desc=table.name, unit="image", hidden=not mine) as bar:
            update = _scaled(bar)
            for cell in todo:
                where = f"{cell.row}, {table.column} {cell.column:g}"
                bar.set_postfix_str(where)
                try:
                    result = evaluator.measure(table, cell, folder / "cells", digests[cell.slug], update)
                except (ValueError, RuntimeError, OSError) as error:
                    if distributed.world_size() > 1:  # the others would wait for this process
                        raise
                    failures.append((Failure(where, one_line(error)), error))
                    continue
                if mine:
                    result.write(folder / "cells" / f"{cell.slug}.json")
                results[cell.slug] = result
                if so_far is not None:
                    so_far(Outcome(table, folder, results, missing_files(table)))
    distributed.barrier()
    if failures and not results:
        raise failures[0][1]
    return Outcome(table, folder, results, missing_files(table), tuple(failure for failure, _ in failures))


def _scaled(bar: Any) -> Callable[[int], None]:
    """Images of this process as those of all."""
    return lambda images: bar.update(images * distributed.world_size())
