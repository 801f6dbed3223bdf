"""A table of results as pictures: the numbers as a plot, the samples side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdistill.metrics.measures import MEASURES
from diffdistill.pictures import GAP, name_lines, save_figure, save_mosaic
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

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(table.measures), squeeze=False)[0]
        for axes, name in zip(panels, table.measures, strict=True):
            values: list[float] = []
            for i, row in enumerate(table.rows):
                style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.3, "markersize": 4}
                marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
                cells = row_cells(outcome, row)
                found = [(c.column, r.measures[name].value) for c in cells if (r := outcome.result(c)) is not None]
                paper = [
                    (c.column, c.published) for c in cells if c.published is not None and name == table.measures[0]
                ]
                if found:
                    axes.plot(*zip(*found, strict=True), f"{marker}-", label=row.name, **style)
                if paper:
                    label = None if found else f"{row.name} (published)"
                    axes.plot(*zip(*paper, strict=True), f"{marker}--", markerfacecolor="white", label=label, **style)
                values += [float(v) for _, v in (*found, *paper)]
            axes.set(xlabel=COLUMNS[table.column], ylabel=MEASURES[name].label)
            axes.set_xticks(list(table.columns), [f"{c:g}" for c in table.columns])
            if values and min(values) > 0 and max(values) > 8 * min(values):
                axes.set_yscale("log")
            name_lines(axes)

    save_figure(draw, path, size=(1 + 5.5 * len(table.measures), max(3.8, 1 + 0.17 * len(table.rows))))


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
