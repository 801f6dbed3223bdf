"""Pictures of a run: grids of images and curves. Drawing libraries are imported where they are used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.files.atomic import replacing

CAPTION_SIZE = 14
GAP = 2


MOST_CURVES = 16
"""Signals drawn in one figure."""


def can_be_drawn(shape: Sequence[int]) -> bool:
    """Whether `save_samples` draws samples of this shape."""
    return len(shape) in (1, 2) or (len(shape) in (3, 4) and shape[0] in (1, 3))


def save_samples(samples: Tensor, path: str | os.PathLike[str]) -> None:
    """Write samples as one PNG, drawn as what they are.

    Args:
        samples: `[N, C, H, W]` images, a grid; `[N, C, T, H, W]` video, a row of frames for each; `[N, C, L]` signals,
            curves; `[N, D]` points, their first two coordinates, or their distribution where D is 1.
        path: the file.

    Raises:
        ValueError: samples of another shape.
    """
    if samples.ndim == 5:
        frames = samples.transpose(1, 2)
        save_grid(frames.flatten(0, 1), path, columns=frames.shape[1])
    elif samples.ndim in (2, 3):
        draw = _draw_points if samples.ndim == 2 else _draw_signals
        save_figure(lambda figure: draw(figure, samples.detach().float().cpu().numpy()), path, size=(6.0, 4.5))
    else:
        save_grid(samples, path)


def _draw_points(figure: Any, points: np.ndarray) -> None:
    axes = figure.add_subplot()
    if points.shape[1] == 1:
        axes.hist(points[:, 0], bins=40, color="#2b6cb0")
        axes.set(xlabel="value", ylabel="samples")
    else:
        axes.scatter(points[:, 0], points[:, 1], s=6, alpha=0.6, linewidths=0, color="#2b6cb0")
        axes.set(xlabel="first coordinate", ylabel="second coordinate")


def _draw_signals(figure: Any, signals: np.ndarray) -> None:
    shown = signals[:MOST_CURVES]
    columns = math.ceil(math.sqrt(len(shown)))
    for i, signal in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, i + 1)
        axes.plot(signal.T, linewidth=1.0)
        axes.tick_params(labelbottom=False, labelleft=False)


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> None:
    """Write images as one PNG, row by row; grey ones make a grey picture, unless it has captions.

    Args:
        images: `[N, C, H, W]` in [-1, 1] (values outside are clipped), with one or three channels.
        path: the file.
        columns: images per row; the square root of N if not given.
        scale: each pixel becomes `scale x scale` pixels; if not given, small images are enlarged to about 48 pixels.
        row_captions: text left of the rows.
        column_captions: text above the columns.

    Raises:
        ValueError: images of another shape.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs images [N, 1 or 3, H, W], not {list(images.shape)}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or max(1, round(48 / max(images.shape[2:])))
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    canvas = np.full((-(-len(pixels) // columns) * height - GAP, columns * width - GAP, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height - GAP, left : left + width - GAP] = image
    grid = Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas)
    _save_captioned(grid, path, (width, height), row_captions, column_captions)


def save_mosaic(
    parts: Sequence[Sequence[Any]],
    path: str | os.PathLike[str],
    *,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> None:
    """Write pictures as one PNG, row by row.

    Args:
        parts: rows of PIL images, None for a place that stays empty; at least one image.
        path: the file.
        row_captions: text left of the rows.
        column_captions: text above the columns.
    """
    from PIL import Image

    images = [part for row in parts for part in row if part is not None]
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    cell = width + 6 * GAP, height + GAP
    canvas = Image.new("RGB", (max(map(len, parts)) * cell[0] - 6 * GAP, len(parts) * cell[1] - GAP), "white")
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            if part is not None:
                canvas.paste(part, (j * cell[0], i * cell[1]))
    _save_captioned(canvas, path, cell, row_captions, column_captions)


def _save_captioned(
    grid: Any, path: str | os.PathLike[str], cell: tuple[int, int], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Write a grid with captions in a margin to its left and above it."""
    from PIL import Image, ImageDraw, ImageFont

    picture = grid
    if rows or columns:
        font: Any = ImageFont.load_default(CAPTION_SIZE)
        left = max((math.ceil(font.getlength(text)) for text in rows), default=0) + (12 if rows else 0)
        top = CAPTION_SIZE + 10 if columns else 0
        picture = Image.new("RGB", (grid.width + left, grid.height + top), "white")
        picture.paste(grid, (left, top))
        draw = ImageDraw.Draw(picture)
        for i, text in enumerate(rows):
            draw.text((left - 6, top + (i + 0.5) * cell[1]), text, fill="black", font=font, anchor="rm")
        for i, text in enumerate(columns):
            draw.text((left + (i + 0.5) * cell[0], top / 2), text, fill="black", font=font, anchor="mm")
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


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
