"""What solvers are compared on: one denoiser, seeds, and the ends of the exact trajectories from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.devices import device_of
from diffdistill.files.atomic import replacing
from diffdistill.reports.progress import progress
from diffdistill.solvers import Solver, make_schedule, sample, seeded_noise


@dataclass(frozen=True, eq=False)
class Problem:
    """What every solver is given: a denoiser, seeds and labels, and the end points to reach.

    Attributes:
        denoiser: callable `(x, sigma, cond) -> x0` with `data_shape`, `sigma_min` and `sigma_max`.
        seeds: of the starting noise.
        labels: long `[N]`, or None.
        endpoints: `[2, N, ...]`, of the reference at sigma_min and at 0; see `reference_endpoints`.
        batch_size: of sampling.
    """

    denoiser: Any
    seeds: Sequence[int]
    labels: Tensor | None
    endpoints: Tensor
    batch_size: int = 250

    def part(self, count: int) -> Problem:
        """The first `count` seeds."""
        labels = None if self.labels is None else self.labels[:count]
        return Problem(self.denoiser, self.seeds[:count], labels, self.endpoints[:, :count], self.batch_size)

    def batches(self) -> list[tuple[Tensor, Tensor | None]]:
        """Noise and labels, in batches."""
        return batches(self.denoiser, self.seeds, self.labels, self.batch_size)


def batches(
    denoiser: Any, seeds: Sequence[int], labels: Tensor | None, batch_size: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Noise `[<= batch_size, ...]` and labels of all seeds, on the denoiser's device."""
    device, parts = device_of(denoiser), []
    for first in range(0, len(seeds), batch_size):
        chunk = slice(first, first + batch_size)
        noise = seeded_noise(seeds[chunk], denoiser.data_shape, device=device)
        parts.append((noise, None if labels is None else labels[chunk].to(device)))
    return parts


def reference_endpoints(
    denoiser: Any,
    seeds: Sequence[int],
    labels: Tensor | None,
    *,
    solver: Solver,
    num_steps: int,
    folder: Path,
    batch_size: int = 250,
) -> Tensor:
    """End points `[2, N, ...]` at sigma_min and at 0 of a fine run.

    Batches that lie in `folder` are not run again, nor where `seeds` are fewer than those that they were made for.
    """
    levels = make_schedule(
        "polynomial", num_steps=num_steps, sigma_min=denoiser.sigma_min, sigma_max=denoiser.sigma_max
    )
    parts = []
    todo = batches(denoiser, seeds, labels, batch_size)
    for index, (noise, cond) in enumerate(progress(todo, desc="reference", unit="batch")):
        path = folder / f"{index:05d}.safetensors"
        known = load_file(path)["endpoints"] if path.exists() else noise[:0].expand(2, *noise[:0].shape)
        if known.shape[1] < len(noise):
            run = sample(
                denoiser,
                noise,
                solver=solver,
                sigmas=levels,
                cond=cond,
                denoise_to_zero=True,
                return_trajectory=True,
            )
            known = run.x[-2:].cpu().contiguous()
            with replacing(path) as temporary:
                save_file({"endpoints": known}, temporary)
        parts.append(known[:, : len(noise)])
    return torch.cat(parts, dim=1)
