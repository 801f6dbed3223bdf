"""What a comparison of solvers found, as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffdistill.evaluation.solver_comparison import Row
from diffdistill.evaluation.text import grid_of, number
from diffdistill.pictures import save_figure

WORDS = ("solver", "schedule")
"""Columns that are not numbers."""


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
    labels = list(dict.fromkeys(row.solver for row in sorted(rows, key=lambda row: (bool(row.parameters), row.error))))
    learned = {row.solver for row in rows if row.parameters}
    panels = {
        "without start": [row for row in rows if row.start is None],
        "with analytic start": [row for row in rows if row.start is not None],
    }

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        shown = {title: part for title, part in panels.items() if part}
        handles: dict[str, Any] = {}
        for axes, (title, part) in zip(
            figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown.items(), strict=True
        ):
            for index, label in enumerate(labels):
                line = sorted((row for row in part if row.solver == label), key=lambda row: row.nfe)
                if line:
                    (handles[label],) = axes.plot(
                        [row.nfe for row in line],
                        [row.error for row in line],
                        marker="os^Dv"[index // 10 % 5],
                        color=f"C{index % 10}",
                        markersize=6 if label in learned else 3.5,
                        linewidth=3 if label in learned else 1.1,
                    )
            axes.set(title=title, yscale="log", xlabel="network evaluations")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter("{x:g}")
        order = [label for label in reversed(labels) if label in handles]
        figure.legend([handles[n] for n in order], order, loc="outside right upper", frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("mean L2 distance to the reference")

    save_figure(draw, path, size=(11, 4.6))
