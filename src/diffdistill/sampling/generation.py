"""Many seeds in batches, from a plan to images; and the pictures that a training run shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser, image_shape, spread_labels
from diffdistill.devices import tuned_convolutions
from diffdistill.registry import check_options
from diffdistill.reports.previews import can_be_drawn
from diffdistill.sampling.plans import Plan, plan
from diffdistill.solvers import sample, seeded_noise

Condition = Tensor | Mapping[str, Tensor]
"""Labels `[N]`, or parts of a condition by name, `[M, ...]`, of which sample i takes row i modulo M."""


def generate(
    plan: Plan, seeds: Sequence[int] | Tensor, labels: Condition | None, *, batch_size: int = 256
) -> Iterator[Tensor]:
    """Yield images `[<= batch_size, ...]` for each seed in turn; a seed gives the same image at any batch size."""
    device, following = plan.device, None
    for first in range(0, len(seeds), batch_size):
        chunk = seeds[first : first + batch_size]
        cond = condition_rows(labels, first, len(chunk), device=device)
        noise = seeded_noise(chunk, plan.denoiser.data_shape, device=device) if following is None else following
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16), tuned_convolutions():
            x = sample(plan.denoiser, noise, seeds=chunk, cond=cond, **plan.options)
        # Drawn by the CPU while a GPU is still at work on this batch.
        rest = seeds[first + batch_size : first + 2 * batch_size]
        following = seeded_noise(rest, plan.denoiser.data_shape, device=device) if len(rest) else None
        yield plan.pictures(x)


def condition_rows(cond: Condition | None, first: int, count: int, *, device: torch.device | str = "cpu") -> Any:
    """The condition of the samples `first`, ..., `first + count - 1`, on a device."""
    if isinstance(cond, Mapping):
        return {name: part[torch.arange(first, first + count) % len(part)].to(device) for name, part in cond.items()}
    return None if cond is None else cond[first : first + count].to(device)


def count_nfe(plan: Plan) -> int:
    """Network evaluations of one sample, counted by drawing one."""
    noise = seeded_noise([0], plan.denoiser.data_shape, device=plan.device)
    cond = spread_labels(1, plan.denoiser.num_classes)
    cond = None if cond is None else cond.to(plan.device)
    run = sample(plan.denoiser, noise, cond=cond, return_trajectory=True, **plan.options)
    return run.nfe


def makes_pictures(denoiser: Denoiser) -> bool:
    """Whether samples are pictures: of 1 or 3 channels, and not latents whose autoencoder is elsewhere."""
    shape = image_shape(denoiser.data_shape, denoiser.codec)
    return len(shape) == 3 and shape[0] in (1, 3) and not _undecoded(denoiser)


def _undecoded(denoiser: Denoiser) -> bool:
    """Whether samples are latents whose autoencoder is elsewhere."""
    return denoiser.codec is None and denoiser.latents


FLOW_MAP_STEPS = 4
"""Of the pictures of a flow map, which takes any number, where no number is asked for."""


def preview(
    trained: Denoiser, *, num_samples: int, w: float | None = None, num_steps: int | None = None
) -> Callable[[Any], Tensor] | None:
    """A function that draws the same `num_samples` seeds from a model each time, for the pictures of a training run.

    None where samples cannot be drawn. Those of a model that takes w are drawn at the nearest w that it is trained for.

    Raises:
        ValueError: an option out of range.
    """
    check_options("preview", preview, {"num_samples": num_samples, "w": w, "num_steps": num_steps})
    for name, count in (("num_samples", num_samples), ("num_steps", num_steps)):
        if count is not None and count < 1:
            raise ValueError(f"preview: {name} must be at least 1, but is {count}")
    if _undecoded(trained) or not can_be_drawn(image_shape(trained.data_shape, trained.codec)):
        return None

    def draw(model: Denoiser) -> Tensor:
        labels = spread_labels(num_samples, model.num_classes)
        low, high = model.w_range or (-math.inf, math.inf)
        shown = None if w is None else min(max(w, low), high)
        steps = FLOW_MAP_STEPS if num_steps is None and model.flow_map and model.distilled is None else num_steps
        return torch.cat(list(generate(plan(model, w=shown, num_steps=steps), range(num_samples), labels)))

    return draw
