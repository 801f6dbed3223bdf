"""What measuring a table takes, before it is begun: files, commands, cells, evaluations and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffdistill.files.remote import is_remote
from diffdistill.tables.cells import Clock, Models, count_evaluations, prepare
from diffdistill.tables.reproduction import Files, known_results, missing_files
from diffdistill.tables.tables import Cell, Need, Table
from diffdistill.training.progress import duration

COMMAND = "diffdistill"
"""How the commands begin that may be run to make a file."""


@dataclass(frozen=True)
class Work:
    """One thing to do before a table can be measured.

    Attributes:
        kind: "fetch", "make", or "by hand" for what no command makes.
        needs: the files that are there afterwards.
        how: the URL, the command, or what a person has to do.
    """

    kind: str
    needs: tuple[Need, ...]
    how: str

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(need.path for need in self.needs)}: {self.how}"


def work_for(table: Table) -> list[Work]:
    """What to do for the missing files of a table, in the order of work: what is fetched may be trained on."""
    ways: dict[str, list[Need]] = {}
    for need in missing_files(table):
        ways.setdefault(need.get, []).append(need)
    order = {"fetch": 0, "make": 1, "by hand": 2}
    work = [Work(_kind(how), tuple(needs), how) for how, needs in ways.items()]
    return sorted(work, key=lambda item: order[item.kind])


def _kind(how: str) -> str:
    if is_remote(how):
        return "fetch"
    return "make" if how.startswith(f"{COMMAND} ") else "by hand"


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
    lines += [str(work) for work in work_for(table)]
    lines.append(f"{evaluations:,} network evaluations to do; about {duration(seconds)} for those that can start now")
    uncounted = "" if table.column == "nfe" else ", and their evaluations are not counted"
    if unknown:
        lines.append(f"{unknown} cells wait for files{uncounted}")
    return "\n".join(lines)


def _unprepared(cell: Cell) -> Cell:
    """The cell with as many steps, on levels that cost nothing to choose."""
    return replace(cell, schedule={"name": "polynomial"}) if (cell.schedule or {}).get("name") == "gits" else cell
