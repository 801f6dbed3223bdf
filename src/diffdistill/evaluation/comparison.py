"""Several ways to sample the same data, side by side: quality against network evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffdistill.data.base import ImageData
from diffdistill.evaluation.report import evaluate_samples
from diffdistill.generation import Plan, count_nfe, generate, spread_labels
from diffdistill.pictures import save_figure, save_grid


@dataclass(frozen=True)
class Row:
    """One model at one guidance weight.

    Attributes:
        name: of the model.
        w: guidance weight.
        nfe: network evaluations of one sample, as counted; a guided evaluation counts twice.
        frechet: Fréchet distance on pixels.
        frechet_features: Fréchet distance on classifier features, or None.
        accuracy: share of samples that the classifier gives their label, or None.
        milliseconds: wall time per image.
    """

    name: str
    w: float
    nfe: int
    frechet: float
    frechet_features: float | None
    accuracy: float | None
    milliseconds: float


def compare(
    plans: Mapping[str, Callable[..., Plan]],
    ws: Sequence[float],
    data: ImageData,
    *,
    num_samples: int,
    batch_size: int = 250,
) -> list[Row]:
    """Measure every model at every w, on the same seeds and labels.

    Args:
        plans: for each model, how to sample it, called with `w=`.
        ws: guidance weights.
        data: the reference.
        num_samples: samples of each measurement.
        batch_size: of sampling.
    """
    rows = []
    with tqdm(total=len(plans) * len(ws) * num_samples, desc="measuring", unit="image") as bar:
        for name, plan_at in plans.items():
            for w in ws:
                plan = plan_at(w=w)
                labels = spread_labels(num_samples, plan.denoiser.num_classes)
                started, parts = time.perf_counter(), []
                for x in generate(plan, range(num_samples), labels, batch_size=batch_size):
                    parts.append(x)
                    bar.update(len(x))
                seconds = time.perf_counter() - started
                measures = evaluate_samples(torch.cat(parts), labels, data)
                rows.append(
                    Row(
                        name,
                        w,
                        count_nfe(plan),
                        measures.frechet_pixels,
                        measures.frechet_features,
                        measures.accuracy,
                        1000 * seconds / num_samples,
                    )
                )
    return rows


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: speed-up relative to the first model."""
    ws = sorted({row.w for row in rows})
    by_name = {name: {r.w: r for r in rows if r.name == name} for name in dict.fromkeys(r.name for r in rows)}
    unit = _milliseconds(next(iter(by_name.values())))
    head = ["model", "NFE", "ms / image", "speed-up", *(f"FD w={w:g}" for w in ws), *(f"accuracy w={w:g}" for w in ws)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, at in by_name.items():
        distances = [f"{at[w].frechet:.3f}" for w in ws]
        accuracies = ["" if (value := at[w].accuracy) is None else f"{value:.3f}" for w in ws]
        milliseconds = _milliseconds(at)
        cost = [str(at[ws[0]].nfe), f"{milliseconds:.2f}", f"{unit / milliseconds:.0f} x"]
        lines.append([name, *cost, *distances, *accuracies])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _milliseconds(at: Mapping[float, Row]) -> float:
    return sum(row.milliseconds for row in at.values()) / len(at)


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Fréchet distance and accuracy against network evaluations, a curve for each w, written as PNG."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for w in sorted({row.w for row in rows}):
            at = sorted((row for row in rows if row.w == w), key=lambda row: row.nfe)
            nfe = [row.nfe for row in at]
            left.plot(nfe, [row.frechet for row in at], "o-", label=f"w = {w:g}")
            right.plot(nfe, [row.accuracy for row in at], "o-", label=f"w = {w:g}")
        left.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance (pixels)")
        right.set(xscale="log", xlabel="network evaluations", ylabel="class accuracy")
        left.legend(frameon=False)

    save_figure(draw, path, size=(9, 3.6))


def side_by_side(plans: Mapping[str, Callable[..., Plan]], w: float, path: Path, *, columns: int = 20) -> None:
    """Write a grid with one model a row and one seed a column."""
    images: list[Tensor] = []
    for plan_at in plans.values():
        plan = plan_at(w=w)
        images += generate(plan, range(columns), spread_labels(columns, plan.denoiser.num_classes))
    save_grid(torch.cat(images), path, columns=columns, scale=4, row_captions=list(plans))


def rows_as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a JSON file."""
    return [asdict(row) for row in rows]
