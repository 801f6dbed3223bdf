"""Models side by side at several guidance weights: what distillation costs and gains, as a table and as pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffdistill.denoiser import spread_labels
from diffdistill.reports.pictures import save_grid
from diffdistill.reports.plots import Line, Panel, plot_panels
from diffdistill.reports.text import markdown_table
from diffdistill.sampling.generation import generate
from diffdistill.tables.cells import Models, Result, prepare
from diffdistill.tables.reproduction import Outcome


def comparison_table(outcome: Outcome) -> str:
    """One line for each model of a table over w: evaluations, time, and speed-up over the first model; then measures.

    Cost is that of the greatest w, as no guidance costs nothing.
    """
    table = outcome.table
    measures = {"FD": "fid", "accuracy": "accuracy"}
    head = ["model", "evaluations", "ms / image", "speed-up"]
    head += [f"{label}, w = {w:g}" for label in measures for w in table.columns]
    lines = [head]
    unit = 0.0
    for name, results in _by_row(outcome).items():
        last = results[-1]
        unit = unit or last.seconds_per_image
        line = [name, str(last.nfe), f"{1000 * last.seconds_per_image:.2f}", f"{unit / last.seconds_per_image:.0f} x"]
        line += [f"{result.measures[measure].value:.3f}" for measure in measures.values() for result in results]
        lines.append(line)
    return markdown_table(lines).rstrip("\n")


def _by_row(outcome: Outcome) -> dict[str, list[Result]]:
    """The results of every row that is measured in full."""
    found: dict[str, list[Result]] = {}
    for row in outcome.table.rows:
        results = [outcome.results.get(c.slug) for c in outcome.table.cells() if c.row == row.name]
        if all(result is not None for result in results):
            found[row.name] = [result for result in results if result is not None]
    return found


def plot_comparison(outcome: Outcome, path: Path) -> None:
    """Fréchet distance and class accuracy against the evaluations at the greatest w, a line for each w, as PNG."""
    rows = sorted(_by_row(outcome).values(), key=lambda results: results[-1].nfe)

    def lines(measure: str) -> list[Line]:
        return [
            Line(f"w = {w:g}", [(results[-1].nfe, results[i].measures[measure].value) for results in rows])
            for i, w in enumerate(outcome.table.columns)
        ]

    distance, accuracy = lines("fid"), lines("accuracy")
    lowest = min((value for line in accuracy for _, value in line.points), default=1.0)
    evaluations = "network evaluations"
    panels = [
        Panel(distance, evaluations, "Fréchet distance (pixels)", xscale="log", yscale="log"),
        Panel(accuracy, evaluations, "class accuracy", xscale="log", ylim=(min(0.9, lowest - 0.005), 1.005)),
    ]
    plot_panels(panels, path, size=(9, 3.6))


def side_by_side(outcome: Outcome, folder: Path, device: torch.device, *, columns: int = 20) -> list[Path]:
    """For each w a grid `samples_w1.png` of what was measured, with one model a row and one seed a column.

    Raises:
        ValueError: the columns of the table are not guidance weights.
    """
    table, models, paths = outcome.table, Models(device), []
    if table.column != "w":
        raise ValueError(f"side_by_side needs a table whose columns are w, not {table.column}")
    for w in table.columns:
        cells = [cell for cell in table.cells() if cell.column == w and outcome.result(cell)]
        images: list[Tensor] = []
        for cell in cells:
            planned = prepare(cell, models).plan
            images += generate(planned, range(columns), spread_labels(columns, planned.denoiser.num_classes))
        if images:
            paths.append(folder / f"samples_w{w:g}.png")
            names = [cell.row for cell in cells]
            save_grid(torch.cat(images), paths[-1], columns=columns, scale=4, row_captions=names)
    return paths
