"""A table of results as text: Markdown and CSV, and the words that pages share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffdistill.metrics.measures import MEASURES
from diffdistill.reports.text import csv_text, markdown_table, number
from diffdistill.tables.cells import Result
from diffdistill.tables.reproduction import Outcome
from diffdistill.tables.tables import Cell, Row

COST_NOTE = (
    "Guidance counts twice, an analytical first step not at all. Times are those of sampling. Learned: the training of "
    "the file itself; a student also needs the stages before it."
)


def row_cells(outcome: Outcome, row: Row) -> list[Cell]:
    """The cells of a row, in the order of the columns."""
    return [outcome.table.cell(row, i) for i in range(len(outcome.table.columns))]


def entry(cell: Cell, result: Result | None, measure: str, *, first: bool) -> str:
    """The text of a cell: the measured value with its spread, then the published one and the difference."""
    published = cell.published if first else None
    if cell.impossible and published is None:
        return "-"
    found = None if result is None else result.measures.get(measure)
    texts = [] if found is None else [str(found)]
    if published is not None:
        difference = "" if found is None else f", {found.value - published:+.2f}"
        texts.append(f"({published:g}{difference})")
    return " ".join(texts)


def status(outcome: Outcome) -> list[str]:
    """What is measured and what is not, in sentences."""
    cells = [cell for cell in outcome.table.cells() if not cell.impossible]
    lines = [f"{len(outcome.results)} of {len(cells)} cells are measured, {outcome.table.num_samples} samples each."]
    lines += [f"Missing: {need.path}: {need.get}." for need in outcome.missing]
    return lines


def made_on(outcome: Outcome) -> list[str]:
    """Hardware and versions behind the results, each once."""
    found = {}
    for result in outcome.results.values():
        found[f"{result.hardware}; " + ", ".join(f"{name} {v}" for name, v in result.versions.items())] = None
    return list(found)


def heading(outcome: Outcome, measure: str) -> str:
    """What a measure is, on which features, and which way is better."""
    label = MEASURES[measure].label
    return f"{label[0].upper()}{label[1:]} ({outcome.table.features}; {MEASURES[measure].better} is better)"


def explanation(outcome: Outcome) -> str:
    """How to read a cell."""
    table, texts = outcome.table, []
    if table.splits > 1:
        texts.append(f"± is the standard deviation over {table.splits} parts of the samples.")
    if any(cell.published is not None for cell in table.cells()):
        texts.append("In brackets: the published value, and measured minus published.")
    if any(cell.impossible for cell in table.cells()):
        texts.append("-: cannot be measured, such as a number of evaluations that the solver cannot take.")
    return " ".join(texts)


def sources(outcome: Outcome) -> dict[str, list[str]]:
    """The rows behind each source of published values."""
    found: dict[str, list[str]] = {}
    for cell in outcome.table.cells():
        if cell.published is not None and cell.row not in found.setdefault(cell.source or "source not stated", []):
            found[cell.source or "source not stated"].append(cell.row)
    return found


def measure_lines(outcome: Outcome, measure: str) -> list[list[str]]:
    """The table of one measure, as text."""
    table = outcome.table
    lines = [["", *(f"{table.column} {column:g}" for column in table.columns)]]
    for row in table.rows:
        texts = [
            entry(c, outcome.result(c), measure, first=measure == table.measures[0]) for c in row_cells(outcome, row)
        ]
        lines.append([row.name, *texts])
    return lines


def cost_lines(outcome: Outcome) -> list[list[str]]:
    """Evaluations and milliseconds per image for each column, and what was trained."""
    table = outcome.table
    lines = [["", *(f"{table.column} {column:g}" for column in table.columns), "learned"]]
    for row in table.rows:
        results = [outcome.result(cell) for cell in row_cells(outcome, row)]
        if any(results):
            texts = ["" if r is None else f"{r.nfe} NFE, {number(1000 * r.seconds_per_image, 3)} ms" for r in results]
            lines.append([row.name, *texts, learned(outcome, row)])
    return lines


def learned(outcome: Outcome, row: Row) -> str:
    """The training behind a row in words: seconds, where they are recorded, and the evaluations of GITS."""
    found: dict[str, str] = {}
    for cell in row_cells(outcome, row):
        result = outcome.result(cell)
        if result is None:
            continue
        for name, record in result.training.items():
            if name == outcome.table.model:
                continue  # what all rows share
            parts = [f"{record['updates']} updates"] if "updates" in record else []
            parts += [f"{record['seconds']:.0f} s"] if "seconds" in record else []
            if parts:
                found[name] = f"{Path(name).name}: {', '.join(parts)}"
        if result.preparation_nfe:
            found["schedule"] = f"schedule: {result.preparation_nfe:,} evaluations"
    return "; ".join(found.values())


def markdown(outcome: Outcome) -> str:
    """The whole table as a Markdown page."""
    table = outcome.table
    parts = [f"# {table.title}\n", table.about.strip() + "\n" if table.about else ""]
    parts.append("\n".join(status(outcome)) + "\n")
    for name in table.measures:
        parts.append(f"## {heading(outcome, name)}\n\n{markdown_table(measure_lines(outcome, name))}")
    parts.append(explanation(outcome) + "\n")
    notes = [f"- {row.name}: {row.note}" for row in table.rows if row.note]
    parts.append("\n".join(notes) + "\n" if notes else "")
    if outcome.results:
        parts.append(f"## Cost of one image\n\n{markdown_table(cost_lines(outcome))}")
        parts.append(COST_NOTE + "\n")
    parts += [f"Published values of {', '.join(rows)}: {source}.\n" for source, rows in sources(outcome).items()]
    parts += [f"Measured on {text}.\n" for text in made_on(outcome)]
    parts.append(f"Made by `{table.made_by}`.\n")
    return "\n".join(part for part in parts if part.strip())


FIELDS: tuple[str, ...] = (
    "table", "row", "column", "value_of_column", "measure", "value", "part_mean", "part_std", "published", "difference",
    "source", "num_samples", "nfe", "num_steps", "seconds_per_image", "learned",
)  # fmt: skip


def as_csv(outcome: Outcome) -> str:
    """One line for each cell and measure; what is not known is empty."""
    return csv_text(FIELDS, _records(outcome))


def _records(outcome: Outcome) -> Iterator[dict[str, Any]]:
    table = outcome.table
    for row in table.rows:
        for cell in row_cells(outcome, row):
            result = outcome.result(cell)
            for name in table.measures:
                published = cell.published if name == table.measures[0] else None
                if result is None and published is None:
                    continue
                record = {
                    "table": table.name,
                    "row": row.name,
                    "column": table.column,
                    "value_of_column": f"{cell.column:g}",
                    "measure": name,
                    "published": published,
                    "source": cell.source if published is not None else None,
                }
                yield record if result is None else record | _numbers(result, name, published, learned(outcome, row))


def _numbers(result: Result, name: str, published: float | None, training: str) -> dict[str, Any]:
    found = result.measures[name]
    return {
        "value": found.value,
        "part_mean": found.part_mean,
        "part_std": found.part_std,
        "difference": None if published is None else found.value - published,
        "num_samples": result.num_samples,
        "nfe": result.nfe,
        "num_steps": result.num_steps,
        "seconds_per_image": result.seconds_per_image,
        "learned": training,
    }
