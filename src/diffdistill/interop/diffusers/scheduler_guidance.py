"""A guidance weight that changes with the noise level, in the stock pipelines whose network takes w."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffdistill.interop.diffusers.conventions import guidance_scale_embedding
from diffdistill.interop.diffusers.levels import stock
from diffdistill.interop.diffusers.scheduler_sources import read_source


@contextmanager
def guidance_by_level(pipeline: Any, weight: Callable[[float], float]) -> Iterator[Any]:
    """Within a `with` statement, the network of `pipeline` is given `weight(sigma)` in place of its `guidance_scale`.

    Args:
        pipeline: of Stable Diffusion or SDXL with a network that embeds w (`time_cond_proj_dim`), or of FLUX with one
            that embeds its guidance (`guidance_embeds`).
        weight: w of Meng et al. 2023 at a noise level, such as `guidance_interval` makes.

    Raises:
        ValueError: the network of the pipeline takes no guidance weight.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    options: Any = getattr(network, "config", {})
    width, flux = options.get("time_cond_proj_dim"), bool(options.get("guidance_embeds"))
    if network is None or not (width or flux):
        raise ValueError(
            f"the network of {type(pipeline).__name__} takes no guidance weight: give it a student that does"
        )
    source = read_source(stock(pipeline.scheduler))

    def replaced(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        timestep = torch.as_tensor(args[1] if len(args) > 1 else given["timestep"]).reshape(-1)[0]
        if flux:  # which embeds t itself, and guidance_scale = w + 1
            w = weight(source.sigma(float(timestep) * source.scheduler.config.num_train_timesteps))
            return args, {**given, "guidance": torch.full_like(given["guidance"], w + 1)}
        w = weight(source.sigma(float(timestep)))
        known = given["timestep_cond"]
        embedded = guidance_scale_embedding(torch.full((len(known),), w), width)
        return args, {**given, "timestep_cond": embedded.to(known)}

    hook = network.register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        yield pipeline
    finally:
        hook.remove()
