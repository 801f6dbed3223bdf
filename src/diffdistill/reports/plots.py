"""Plots of results as PNG, in one style. Matplotlib is imported where it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffdistill.files.atomic import replacing

NOT_CURVES = ("update", "samples", "seconds", "learning_rate")


def plot_curves(metrics: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Plot every metric against the update, loss on a logarithmic axis; nothing is written where there is none.

    Args:
        metrics: the records of a metrics.jsonl file.
        path: the PNG file.
    """
    names = [name for name in dict.fromkeys(n for record in metrics for n in record) if name not in NOT_CURVES]
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)

    def draw(figure: Any) -> None:
        for i, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, i + 1)
            points = [(r["update"], r[name]) for r in metrics if name in r]
            axes.plot(*zip(*points, strict=True), color="#2b6cb0", linewidth=1.4, marker="." if len(points) < 3 else "")
            if min(value for _, value in points) > 0:
                axes.set_yscale("log")
            axes.set(title=name.replace("_", " "), xlabel="update")

    save_figure(draw, path, size=(4.2 * columns, 2.9 * rows))


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: its name, or None for a line that is not named.
        points: pairs (x, y).
        color: as matplotlib takes it; None goes on in its cycle.
        marker: of the points.
        dashed: a dashed line with open markers, for values that were not measured here.
        bold: thick, with its name in bold.
    """

    label: str | None
    points: Sequence[tuple[float, float]]
    color: str | None = None
    marker: str = "o"
    dashed: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on common axes; those with a label are named at the right.

    Attributes:
        lines: the lines.
        xlabel, ylabel, title: texts.
        xticks: where the x axis is labelled; None leaves that to matplotlib.
        xscale, yscale: "linear" or "log".
        ylim: ends of the y axis; None fits them to the lines.
    """

    lines: Sequence[Line]
    xlabel: str
    ylabel: str = ""
    title: str = ""
    xticks: Sequence[float] | None = None
    xscale: Literal["linear", "log"] = "linear"
    yscale: Literal["linear", "log"] = "linear"
    ylim: tuple[float, float] | None = None


def plot_panels(
    panels: Sequence[Panel], path: str | os.PathLike[str], *, size: tuple[float, float], share_y: bool = False
) -> None:
    """Write panels side by side as PNG; `size` is width and height in inches."""

    def draw(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=share_y)[0], panels, strict=True):
            for line in panel.lines:
                axes.plot(
                    *zip(*line.points, strict=True),
                    linestyle="--" if line.dashed else "-",
                    label=line.label,
                    color=line.color,
                    marker=line.marker,
                    markerfacecolor="white" if line.dashed else None,
                    linewidth=2.8 if line.bold else 1.2,
                    markersize=6 if line.bold else 4,
                )
            axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
            axes.set(xscale=panel.xscale, yscale=panel.yscale)
            if panel.ylim is not None:  # else the axes go on fitting to their lines
                axes.set_ylim(panel.ylim)
            if panel.xticks is not None:
                axes.set_xticks(list(panel.xticks), [f"{tick:g}" for tick in panel.xticks])
        for axes in figure.axes:  # once all have their scales
            name_lines(axes)

    save_figure(draw, path, size=size)


def save_figure(draw: Callable[[Any], None], path: str | os.PathLike[str], *, size: tuple[float, float]) -> None:
    """Write a figure as PNG in the style of all figures here.

    Args:
        draw: fills an empty `matplotlib.figure.Figure`.
        path: the file.
        size: width and height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _number_plainly(axis)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _number_plainly(axis: Any) -> None:
    """Write 0.6 on a logarithmic axis, where matplotlib writes 6 x 10^-1, at the ticks that it would label."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            text, plain = super().__call__(x, pos), f"{x:g}"
            return plain if text and "e" not in plain else text

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def name_lines(axes: Any, *, size: float = 7.5) -> None:
    """Write the name of each line at the right, pushed apart where they would meet, in place of a legend.

    A dotted line leads to it from the last point: solid, that of a single point would pass for a curve. Call it
    once all lines are drawn and both axes have their scales.
    """
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return
    axes.margins(x=0.04)
    axes.get_ylim()  # matplotlib fits the axes to their lines only when someone looks
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    heights = axes.transAxes.inverted().transform(axes.transData.transform(ends))[:, 1]
    step = 1.5 * size / (axes.figure.get_figheight() * 72)
    order = np.argsort(heights)
    for line, end, place in zip(
        (lines[i] for i in order), (ends[i] for i in order), _apart(heights[order], step), strict=True
    ):
        colour = line.get_color()
        axes.annotate(
            line.get_label(),
            end,
            xytext=(1.04, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            fontweight="bold" if line.get_linewidth() > 2 else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "linestyle": ":", "relpos": (0, 0.5)},
        )


def _apart(places: Any, step: float) -> list[float]:
    """Numbers at least `step` apart and within [0, 1] where there is room: the nearest to `places`, which increase.

    Nearest in the least squares: those of a run that has to share its room keep their mean.
    """
    last = (len(places) - 1) * step
    runs: list[tuple[float, int]] = []
    for i, place in enumerate(places):
        mean, count = min(max(place - i * step, 0), 1 - last), 1
        while runs and runs[-1][0] > mean:
            before, number = runs.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        runs.append((mean, count))
    means = [mean for mean, count in runs for _ in range(count)]
    return [mean + i * step for i, mean in enumerate(means)]
