"""Sets of samples: drawn in parts that survive an interruption, and saved as npz, PNG files or a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdistill.denoiser import NULL_LABEL, Denoiser, spread_labels
from diffdistill.distributed import barrier, rank, world_size
from diffdistill.files.archives import open_npz
from diffdistill.files.atomic import replacing
from diffdistill.reports.pictures import save_grid
from diffdistill.reports.progress import progress
from diffdistill.sampling.generation import Condition, condition_rows, generate, makes_pictures
from diffdistill.sampling.plans import Plan

GRID_SAMPLES = 100


@dataclass(frozen=True, eq=False)
class Samples:
    """Images `x`: float32 `[N, C, H, W]` in [-1, 1], and the labels `y`: long `[N]` that they were asked for, or -1.

    Latents have any range.
    """

    x: Tensor
    y: Tensor


def chosen_labels(labels: int | Sequence[int] | None, num_samples: int, model: Denoiser) -> Tensor | None:
    """Labels `[num_samples]`: the given ones, repeated, or all classes evenly.

    Raises:
        ValueError: a label that the model does not know.
    """
    if labels is None:
        return spread_labels(num_samples, model.num_classes)
    given = [labels] if isinstance(labels, (int, str)) else list(labels)
    if not given or not all(type(label) is int for label in given):
        raise ValueError(f"labels must be a class, or a list of classes, as integers, but is {labels!r}")
    given = torch.tensor(given)
    model.check_condition(given, len(given))
    return given[torch.arange(num_samples) % len(given)]


def draw_to(
    folder: Path, plan: Plan, seeds: Sequence[int], labels: Condition | None, *, key: str, batch_size: int = 256
) -> Samples:
    """Draw a sample for each seed; the parts that lie in `folder` already are read instead of drawn again.

    Several processes draw parts in turn, and each returns all of them.

    Args:
        folder: where the parts lie.
        plan: how to sample.
        seeds: of the samples.
        labels: long `[N]`, or the condition of a text model, or None.
        key: what decides the samples, such as `Run.digest`: parts of another key are not read.
        batch_size: samples of a part.

    Raises:
        ValueError: there are more processes than samples.
    """
    if len(seeds) < world_size():
        raise ValueError(f"num_samples={len(seeds)} is less than one for each of the {world_size()} processes")
    paths = {
        start: folder / f"{start:08d}-{min(start + batch_size, len(seeds)):08d}.{key}.npz"
        for start in range(0, len(seeds), batch_size)
    }
    own = list(paths.items())[rank() :: world_size()]
    for start, path in progress(own, desc="sampling", unit="batch", hidden=rank() != 0):
        if path.exists():
            continue
        chunk = seeds[start : start + batch_size]
        (x,) = generate(plan, chunk, condition_rows(labels, start, len(chunk)), batch_size=batch_size)
        x = x.float().clamp(-1, 1) if plan.codec is not None or makes_pictures(plan.denoiser) else x.float()
        with replacing(path) as temporary:
            np.savez(temporary, x=x.cpu().numpy())
    barrier()
    return Samples(
        torch.cat([_read_part(path) for path in paths.values()]),
        labels if isinstance(labels, Tensor) else torch.full((len(seeds),), NULL_LABEL),
    )


def _read_part(path: Path) -> Tensor:
    with open_npz(path, what="samples") as part:
        return torch.from_numpy(part["x"])


def save_npz(samples: Samples, folder: Path) -> Path:
    """Write `samples.npz` with `x` and `y`."""
    path = folder / "samples.npz"
    with replacing(path) as temporary:
        np.savez(temporary, x=samples.x.numpy(), y=samples.y.numpy())
    return path


def save_pngs(samples: Samples, folder: Path) -> Path:
    """Write each image to `png/000000.png`, `png/000001.png`, ..."""
    for i, image in enumerate(samples.x):
        save_grid(image[None], folder / "png" / f"{i:06d}.png", columns=1, scale=1)
    return folder / "png"


def save_sample_grid(samples: Samples, folder: Path) -> Path:
    """Write the first 100 images as `samples.png`."""
    path = folder / "samples.png"
    save_grid(samples.x[:GRID_SAMPLES], path)
    return path


WRITERS: dict[str, Callable[[Samples, Path], Path]] = {
    "npz": save_npz,
    "png": save_pngs,
    "grid": save_sample_grid,
}
"""What samples can be saved as."""
