"""The shape of sampling trajectories: how few dimensions each one lies in (Zhou et al. 2024, Section 3.1).

Every trajectory is looked at by itself: its points are centred, and their principal components are the right singular
vectors of the matrix of points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.reports.plots import save_figure
from diffdistill.solvers.integration import Trajectory

MAX_COMPONENTS = 5


@dataclass(frozen=True, eq=False)
class TrajectoryShape:
    """What `analyze` measured, for P points of B trajectories and up to K components; float64.

    Attributes:
        sigmas: `[P]`, noise levels of the points.
        explained: `[B, K]`, share of the variance that the first 1 .. K components explain.
        reconstruction: `[K, P, B]`, distance of each point from its projection onto the first 1 .. K components.
        deviation: `[P, B]`, distance of each point from the chord, the line through both ends.
        curvature: `[P - 2, B]`, of the circle through each point and its two neighbours.
        length: `[B]`, of the chord.
    """

    sigmas: Tensor
    explained: Tensor
    reconstruction: Tensor
    deviation: Tensor
    curvature: Tensor
    length: Tensor

    def numbers(self) -> dict[str, Any]:
        """Summaries over the trajectories: means, and the least explained variance."""
        relative = self.reconstruction / self.length
        return {
            "trajectories": self.explained.shape[0],
            "points": len(self.sigmas),
            "explained_mean": self.explained.mean(0).tolist(),
            "explained_least": self.explained.amin(0).tolist(),
            "reconstruction_mean": self.reconstruction.mean((1, 2)).tolist(),
            "reconstruction_largest_of_chord": relative.amax(1).mean(1).tolist(),
            "deviation_largest_mean": float(self.deviation.amax(0).mean()),
            "deviation_largest_of_chord": float((self.deviation.amax(0) / self.length).mean()),
            "deviation_largest_at_sigma": float(self.sigmas[self.deviation.mean(1).argmax()]),
            "curvature_largest_at_sigma": float(self.sigmas[1:-1][self.curvature.mean(1).argmax()]),
            "chord_mean": float(self.length.mean()),
        }


def analyze(run: Trajectory, *, components: int = MAX_COMPONENTS) -> TrajectoryShape:
    """Measure the shape of the trajectories of a run.

    Args:
        run: from `sample(..., return_trajectory=True)`, of at least three points.
        components: K; at most the number of points and of dimensions.

    Raises:
        ValueError: fewer than three points, or more components than there can be.
    """
    points = run.x.double().flatten(2).transpose(0, 1)
    _, count, dimensions = points.shape
    if count < 3:
        raise ValueError(f"the shape of a trajectory needs at least 3 points, not {count}")
    if not 1 <= components <= min(count, dimensions):
        raise ValueError(f"components must be 1 to {min(count, dimensions)}, but is {components}")
    centred = points - points.mean(1, keepdim=True)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    variance = singular.square()
    explained = variance.cumsum(1)[:, :components] / variance.sum(1, keepdim=True)
    coordinates = centred @ directions.mT
    # What the components from number k on hold is what the first k miss.
    missed = coordinates.square().flip(2).cumsum(2).flip(2)
    missed = torch.cat([missed, torch.zeros_like(missed[:, :, :1])], dim=2)[:, :, 1 : components + 1]
    return TrajectoryShape(
        sigmas=run.sigmas.double().cpu(),
        explained=explained.cpu(),
        reconstruction=missed.sqrt().permute(2, 1, 0).cpu(),
        deviation=chord_deviation(points).mT.cpu(),
        curvature=circle_curvature(points).mT.cpu(),
        length=(points[:, -1] - points[:, 0]).norm(dim=1).cpu(),
    )


def chord_deviation(points: Tensor) -> Tensor:
    """Distance `[B, P]` of the points `[B, P, D]` from the line through the first and the last of each trajectory."""
    start = points[:, :1]
    direction = points[:, -1:] - start
    direction = direction / direction.norm(dim=2, keepdim=True)
    offset = points - start
    return (offset - (offset * direction).sum(2, keepdim=True) * direction).norm(dim=2)


def circle_curvature(points: Tensor) -> Tensor:
    """Menger curvature `[B, P - 2]` of the points `[B, P, D]`: 1 over the radius of the circle through each three."""
    before, after = points[:, 1:-1] - points[:, :-2], points[:, 2:] - points[:, 1:-1]
    a, b, c = before.norm(dim=2), after.norm(dim=2), (before + after).norm(dim=2)
    along = (before * after).sum(2) / a
    height = (after - (along / a).unsqueeze(2) * before).norm(dim=2)
    return 2 * height / (b * c)


def plot_shapes(shapes: Sequence[tuple[str, TrajectoryShape]], path: Path) -> None:
    """Write the figure of the paper, and deviation and curvature beside it, a row for each set of trajectories."""

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(shapes), 4, squeeze=False)
        for (name, shape), (variance, error, deviation, curvature) in zip(shapes, grid, strict=True):
            ks = range(1, shape.explained.shape[1] + 1)
            missing = (1 - shape.explained).clamp(min=1e-12)
            variance.plot(ks, 100 * missing.mean(0), "o-", label="mean")
            variance.plot(ks, 100 * missing.amax(0), "s--", label="worst")
            variance.set(title=f"{name}: variance left out (%)", xlabel="components", yscale="log", xticks=list(ks))
            variance.axhline(1.0, color="grey", linewidth=0.8)
            variance.legend(frameon=False, fontsize=8)
            for k, values in zip(ks, shape.reconstruction, strict=True):
                error.plot(shape.sigmas, values.mean(1), label=f"{k}")
            error.set(title="distance from the components", xlabel="sigma", xscale="log", yscale="log")
            error.legend(frameon=False, fontsize=7, ncols=2)
            band(deviation, shape.sigmas, shape.deviation)
            deviation.set(title="distance from the chord", xlabel="sigma", xscale="log")
            band(curvature, shape.sigmas[1:-1], shape.curvature)
            curvature.set(title="curvature", xlabel="sigma", xscale="log", yscale="log")

    def band(axes: Any, sigmas: Tensor, values: Tensor) -> None:
        low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), dim=1)
        axes.fill_between(sigmas, low, high, alpha=0.25, linewidth=0)
        axes.plot(sigmas, middle)

    save_figure(draw, path, size=(15, 3.2 * len(shapes)))
