"""Where trajectories start: the noise and the condition of a training batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.training.randomness import randint, randn


def draw_start(denoiser: Denoiser, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Any]:
    """Standard normal noise `[B, ...]` and a condition for each sample.

    Both are taken from the batch where it has them (`noise`; `cond`, such as text embeddings, or labels `y`); else the
    noise is drawn, and labels are uniform over the classes of a conditional denoiser.
    """
    count = len(next(iter(batch.values())))
    noise = batch["noise"] if "noise" in batch else randn((count, *denoiser.data_shape), generator)
    if "cond" in batch:
        return noise, batch["cond"]
    if not denoiser.num_classes:
        return noise, None
    return noise, batch["y"] if "y" in batch else randint(denoiser.num_classes, (count,), generator)
