"""Samples of any shape as one picture: grids of images, frames of video, curves of signals, points."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffdistill.reports.pictures import save_grid
from diffdistill.reports.plots import save_figure

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
