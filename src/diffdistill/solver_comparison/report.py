"""What a comparison of solvers found, as Markdown, CSV and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from diffdistill.reports.plots import Line, Panel, plot_panels
from diffdistill.reports.text import csv_text, markdown_table, number
from diffdistill.solver_comparison.ranking import Measurement

WORDS = ("solver", "schedule")
"""Columns that are not numbers."""
FIXED = ("#5b7fa6", "#c28a4b", "#6a9f6a", "#8d77ad", "#7f8c8d", "#a67c6d", "#4fa3a5", "#b9819c")
LEARNED = ("#c0182b", "#1a1a1a", "#0b5cad", "#0a7d33")


def as_markdown(rows: Sequence[Measurement]) -> str:
    """The measurements as a Markdown table, the least error of each number of evaluations in bold."""
    least = {nfe: min(row.error for row in rows if row.nfe == nfe) for nfe in {row.nfe for row in rows}}
    lines = [[field.name.replace("_", " ") for field in fields(Measurement)]]
    for row in rows:
        cells = {field.name: _text(getattr(row, field.name)) for field in fields(Measurement)}
        if row.error == least[row.nfe]:
            cells["error"] = f"**{cells['error']}**"
        lines.append([*cells.values()])
    return markdown_table(lines, words=WORDS)


def gains(rows: Sequence[Measurement]) -> str:
    """A Markdown table: least error of a fixed solver with and without analytic start, by number of evaluations."""
    lines = [["NFE", "without start", "with start", "ratio"]]
    for nfe in sorted({row.nfe for row in rows}):
        fixed = [row for row in rows if row.nfe == nfe and not row.parameters]
        errors = [[row.error for row in fixed if (row.start is not None) == started] for started in (False, True)]
        if all(errors):
            plain, started = map(min, errors)
            lines.append([str(nfe), number(plain), number(started), f"{started / plain:.3f}"])
    return markdown_table(lines, words=())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_csv(measurements: Sequence[Measurement]) -> str:
    """The measurements as CSV, with all digits."""
    return csv_text([field.name for field in fields(Measurement)], map(asdict, measurements))


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """End point error against evaluations, without and with analytic start, as PNG; learned solvers are drawn bold."""
    colours = _colours(measurements)
    panels = []
    for title, started in (("without start", False), ("with analytic start", True)):
        part = [row for row in measurements if (row.start is not None) == started]
        lines = [
            Line(
                solver,
                sorted((row.nfe, row.error) for row in part if row.solver == solver),
                colours[solver],
                bold=any(row.parameters for row in part if row.solver == solver),
            )
            for solver in dict.fromkeys(row.solver for row in part)
        ]
        ticks = sorted({row.nfe for row in part})
        label = "" if panels else "mean L2 distance to the reference"
        if lines:
            panels.append(Panel(lines, "network evaluations", label, title, xticks=ticks, yscale="log"))
    plot_panels(panels, path, size=(1 + 5 * len(panels), 5), share_y=True)


def _colours(measurements: Sequence[Measurement]) -> dict[str, str]:
    """The colour of each solver, in both panels alike; a learned one has the same with and without a start."""
    chosen: dict[str, str] = {}
    for learned, colours in ((False, FIXED), (True, LEARNED)):
        solvers = dict.fromkeys(row.solver for row in measurements if bool(row.parameters) == learned)
        families = list(dict.fromkeys(solver.removesuffix("-start") for solver in solvers))
        for solver in solvers:
            chosen[solver] = colours[families.index(solver.removesuffix("-start")) % len(colours)]
    return chosen
