"""Inpainting by models without mask channels: the known region is put back at every step (Lugmayr et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.editing.image_to_image import Start, run
from diffdistill.solvers import Solver
from diffdistill.solvers.schedules import check_sigmas


@dataclass(frozen=True, eq=False)
class Known:
    """The known region of images.

    Attributes:
        x0: images or latents `[B, C, H, W]`; what they hold where nothing is known does not matter and becomes 0.
        mask: 1 where `x0` is known and 0 where it is to be made, `[B, 1, H, W]` or `[1, 1, H, W]`; it may be boolean.

    Raises:
        ValueError: a mask of another size, or with values outside [0, 1].
    """

    x0: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        allowed = {(n, 1, *self.x0.shape[2:]) for n in (1, len(self.x0))}
        if tuple(self.mask.shape) not in allowed:
            raise ValueError(
                f"a mask of {list(self.mask.shape)} does not fit images {list(self.x0.shape)}: it is "
                f"{[len(self.x0), 1, *self.x0.shape[2:]]}, 1 where the image is known"
            )
        if not bool(((self.mask >= 0) & (self.mask <= 1)).all()):
            raise ValueError("the values of a mask lie in [0, 1], 1 where the image is known")
        object.__setattr__(self, "mask", self.mask.to(self.x0))
        object.__setattr__(self, "x0", torch.where(self.mask > 0, self.x0, 0.0))

    def put_into(self, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """`x` with the known region replaced by `x0 + sigma noise`."""
        mask = self.mask.to(x)
        return mask * (self.x0 + sigma * noise) + (1 - mask) * x


@torch.no_grad()
def inpaint(
    denoiser: Callable[..., Tensor],
    known: Known,
    noise: Tensor,
    *,
    solver: Solver,
    sigmas: Tensor,
    cond: Any = None,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    repeats: int = 1,
) -> Tensor:
    """Make what is not known; the known region of the result is that of `known.x0` exactly.

    After every step the known region is set to `x0 + sigma noise`, with the same noise at every level, as the pipelines
    of diffusers do for models without mask channels. With `repeats` above 1 each step is taken so many times, with
    noise back to its beginning in between (Lugmayr et al. 2022, Algorithm 1): what is made comes to fit what is known.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`.
        known: the images and where they are known.
        noise: standard normal, in the shape of the images.
        solver: from `make_solver`.
        sigmas: the schedule.
        cond: the condition that the images shall have.
        seeds: one per sample, for stochastic solvers, by default 0 .. B - 1.
        start: the state at the first level, by default noise with the known region in it.
        repeats: times that each step is taken.

    Returns:
        Images or latents in the shape of `known.x0`.

    Raises:
        ValueError: noise of another shape, levels that do not decrease, or less than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, but is {repeats}")
    if noise.shape != known.x0.shape:
        raise ValueError(f"the noise has shape {list(noise.shape)}, but the image {list(known.x0.shape)}")
    sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64).cpu())
    top = float(sigmas[0])
    first = known.put_into(top * noise, noise, top) if start is None else start

    def put_back(x: Tensor, sigma: float) -> Tensor:
        return known.put_into(x, noise, sigma)

    x = run(denoiser, Start(first, sigmas), solver, cond, seeds, between=put_back, repeats=repeats)
    return known.put_into(x, noise, 0.0)
