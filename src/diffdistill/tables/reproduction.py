"""Measuring a whole table, cell by cell: what is done stays done, what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffdistill import distributed
from diffdistill.files.atomic import write_text
from diffdistill.files.hashes import sha256
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.sources import reference_from
from diffdistill.progress import progress
from diffdistill.tables.cells import CellEvaluator, Clock, Models, Result, count_evaluations, prepare
from diffdistill.tables.tables import Cell, Need, Table, located
from diffdistill.training.progress import duration


@dataclass(frozen=True)
class Outcome:
    """A table with what is known of it.

    Attributes:
        table: the table.
        folder: where it lies.
        results: by the slug of the cell.
        missing: files that cells wait for.
    """

    table: Table
    folder: Path
    results: Mapping[str, Result]
    missing: tuple[Need, ...] = ()

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

    Raises:
        ValueError, FileNotFoundError: files that are damaged or do not fit; a file that is merely absent is reported
            in the outcome.
    """
    models = Models(device)
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
                bar.set_postfix_str(f"{cell.row}, {table.column} {cell.column:g}")
                result = evaluator.measure(table, cell, folder / "cells", digests[cell.slug], update)
                if mine:
                    result.write(folder / "cells" / f"{cell.slug}.json")
                results[cell.slug] = result
    distributed.barrier()
    return Outcome(table, folder, results, missing_files(table))


def _scaled(bar: Any) -> Callable[[int], None]:
    """Images of this process as those of all."""
    return lambda images: bar.update(images * distributed.world_size())


def dry_run(table: Table, folder: Path, *, device: torch.device, batch_size: int = 256) -> str:
    """What measuring a table would do: its cells, their files and how to get those missing, evaluations, time."""
    models = Models(device)
    clock = Clock(models)
    done, _ = known_results(table, folder, Files(folder / "files.json", writes=False))
    lines = [f"table {table.name}: {table.title}", f"{table.num_samples} samples of each cell, in {folder}", ""]
    evaluations, seconds, unknown = 0, 0.0, 0
    for cell in table.cells():
        where = f"{cell.row}, {table.column} {cell.column:g}"
        if cell.impossible:
            lines.append(f"  none     {where}: {cell.impossible}")
            continue
        if cell.missing:
            lines.append(f"  missing  {where}: {', '.join(need.path for need in cell.missing)}")
            unknown += 1
            evaluations += int(cell.column) * table.num_samples if table.column == "nfe" else 0
            continue
        if cell.slug in done:
            lines.append(f"  done     {where}")
            continue
        nfe = count_evaluations(table, cell, prepare(_unprepared(cell), models).plan)
        took = nfe * table.num_samples * clock.seconds(cell.model, min(batch_size, table.num_samples))
        evaluations, seconds = evaluations + nfe * table.num_samples, seconds + took
        lines.append(f"  to do    {where}: {nfe} evaluations an image, about {duration(took)}")
    lines.append("")
    for need in missing_files(table):
        lines.append(f"missing: {need.path}: {need.get}")
    lines.append(f"{evaluations:,} network evaluations to do; about {duration(seconds)} for those that can start now")
    uncounted = "" if table.column == "nfe" else ", and their evaluations are not counted"
    if unknown:
        lines.append(f"{unknown} cells wait for files{uncounted}")
    return "\n".join(lines)


def _unprepared(cell: Cell) -> Cell:
    """The cell with as many steps, on levels that cost nothing to choose."""
    return replace(cell, schedule={"name": "polynomial"}) if (cell.schedule or {}).get("name") == "gits" else cell
