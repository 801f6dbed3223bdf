"""What a comparison of solvers found, as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffdistill.metrics.text import grid_of, number
from diffdistill.pictures import name_lines, save_figure
from diffdistill.solver_comparison.ranking import Row

WORDS = ("solver", "schedule")
"""Columns that are not numbers."""
FIXED = ("#5b7fa6", "#c28a4b", "#6a9f6a", "#8d77ad", "#7f8c8d", "#a67c6d", "#4fa3a5", "#b9819c")
LEARNED = ("#c0182b", "#1a1a1a", "#0b5cad", "#0a7d33")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, the least error of each number of evaluations in bold."""
    least = {nfe: min(row.error for row in rows if row.nfe == nfe) for nfe in {row.nfe for row in rows}}
    lines = [[field.name.replace("_", " ") for field in fields(Row)]]
    for row in rows:
        cells = {field.name: _text(getattr(row, field.name)) for field in fields(Row)}
        if row.error == least[row.nfe]:
            cells["error"] = f"**{cells['error']}**"
        lines.append([*cells.values()])
    return grid_of(lines, words=WORDS)


def gains(rows: Sequence[Row]) -> str:
    """A Markdown table: least error of a fixed solver with and without analytic start, by number of evaluations."""
    lines = [["NFE", "without start", "with start", "ratio"]]
    for nfe in sorted({row.nfe for row in rows}):
        fixed = [row for row in rows if row.nfe == nfe and not row.parameters]
        errors = [[row.error for row in fixed if (row.start is not None) == started] for started in (False, True)]
        if all(errors):
            plain, started = map(min, errors)
            lines.append([str(nfe), number(plain), number(started), f"{started / plain:.3f}"])
    return grid_of(lines, words=())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def comma_separated(rows: Sequence[Row]) -> str:
    """The rows as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows([getattr(row, field.name) for field in fields(Row)] for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Row], path: Path) -> None:
    """End point error against evaluations, without and with analytic start, as PNG; learned solvers are drawn bold."""
    panels = {
        "without start": [row for row in rows if row.start is None],
        "with analytic start": [row for row in rows if row.start is not None],
    }
    shown = {title: part for title, part in panels.items() if part}
    styles = _styles(rows)

    def draw(figure: Any) -> None:
        for i, (title, part) in enumerate(shown.items()):
            axes = figure.add_subplot(1, len(shown), i + 1, sharey=figure.axes[0] if i else None)
            for solver in dict.fromkeys(row.solver for row in part):
                line = sorted((row.nfe, row.error) for row in part if row.solver == solver)
                axes.plot(*zip(*line, strict=True), "o-", label=solver, **styles[solver])
            axes.set(title=title, yscale="log", xlabel="network evaluations")
            axes.set_xticks(sorted({row.nfe for row in part}))
        for axes in figure.axes:
            name_lines(axes)
        figure.axes[0].set_ylabel("mean L2 distance to the reference")

    save_figure(draw, path, size=(1 + 5 * len(shown), 5))


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How to draw each solver, in both panels alike; a learned one has the same colour with and without a start."""
    styles: dict[str, dict[str, Any]] = {}
    for learned, colours in ((False, FIXED), (True, LEARNED)):
        solvers = dict.fromkeys(row.solver for row in rows if bool(row.parameters) == learned)
        families = list(dict.fromkeys(solver.removesuffix("-start") for solver in solvers))
        for solver in solvers:
            colour = colours[families.index(solver.removesuffix("-start")) % len(colours)]
            size = {"linewidth": 2.8, "markersize": 6} if learned else {"linewidth": 1.0, "markersize": 3}
            styles[solver] = {"color": colour, **size}
    return styles
