"""A table of results as pictures: the numbers as a plot, the samples side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdistill.metrics.measures import MEASURES
from diffdistill.reports.pictures import GAP, save_mosaic
from diffdistill.reports.plots import Line, Panel, plot_panels
from diffdistill.tables.cells import GRID_COLUMNS, GRID_IMAGES
from diffdistill.tables.pages import row_cells
from diffdistill.tables.reproduction import Outcome
from diffdistill.tables.tables import COLUMNS

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f")
MARKERS = "osD^v"
LINE_HEIGHT = 32
"""Of samples side by side, in pixels; smaller ones are enlarged."""


def plot(outcome: Outcome, path: Path) -> None:
    """One panel for each measure: a line for each row, dashed where the values are published ones."""
    table = outcome.table
    panels = [_panel(outcome, name) for name in table.measures]
    plot_panels(panels, path, size=(1 + 5.5 * len(panels), max(3.8, 1 + 0.17 * len(table.rows))))


def _panel(outcome: Outcome, name: str) -> Panel:
    table, lines = outcome.table, []
    for i, row in enumerate(table.rows):
        color, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        cells = row_cells(outcome, row)
        found = [(c.column, r.measures[name].value) for c in cells if (r := outcome.result(c)) is not None]
        paper = [(c.column, c.published) for c in cells if c.published is not None and name == table.measures[0]]
        if found:
            lines.append(Line(row.name, found, color, marker))
        if paper:
            lines.append(Line(None if found else f"{row.name} (published)", paper, color, marker, dashed=True))
    values = [value for line in lines for _, value in line.points]
    wide = bool(values) and 0 < 8 * min(values) < max(values)
    return Panel(
        lines, COLUMNS[table.column], MEASURES[name].label, xticks=table.columns, yscale="log" if wide else "linear"
    )


def show_samples(outcome: Outcome, path: Path) -> None:
    """The first line of each cell's grid, the same seeds below each other; nothing is written where there is none."""
    from PIL import Image

    table = outcome.table
    lines = -(-min(GRID_IMAGES, table.num_samples) // GRID_COLUMNS)
    rows: dict[str, list[Any]] = {}
    for row in table.rows:
        strips: list[Any] = []
        for cell in row_cells(outcome, row):
            file = outcome.folder / "cells" / f"{cell.slug}.png"
            if outcome.result(cell) is None or not file.is_file():
                strips.append(None)
                continue
            with Image.open(file) as grid:
                strip = grid.crop((0, 0, grid.width, (grid.height + GAP) // lines - GAP))
            scale = max(1, round(LINE_HEIGHT / strip.height))
            strips.append(strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST))
        if any(strips):
            rows[row.name] = strips
    if rows:
        columns = [f"{table.column} = {column:g}" for column in table.columns]
        save_mosaic([*rows.values()], path, row_captions=[*rows], column_captions=columns)
