"""Edits of pictures by a model, whether it works on pixels or on latents: what `diffdistill edit` offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdistill.denoiser import Codec, Denoiser
from diffdistill.editing.encoding import LEVEL_TOLERANCE, encode, levels_up_to
from diffdistill.editing.image_to_image import image_to_image, levels_left, noised, run
from diffdistill.editing.inpainting import Known, inpaint
from diffdistill.sampling.plans import Plan, plan
from diffdistill.solvers import Euler, sample, seeded_noise

STRENGTH = 0.6
"""Of image-to-image and style transfer, where none is given."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What an edit is made of.

    Attributes:
        images: `[B, C, H, W]` in [-1, 1].
        plan: the denoiser that makes the result, with its solver and levels.
        cond: the condition that the result shall have.
        codec: the autoencoder of a latent model, or None.
        strength: in [0, 1]: the share of the plan's steps to go through; 1 begins with noise. None: 1 for inpainting,
            0.6 for others.
        known: for inpainting, 1 where the image is known, `[1 or B, 1, H, W]`.
        repeats: for inpainting by models without mask channels, times that each step is taken.
        source: how to encode: a denoiser with its solver and levels, which end above 0.
        source_cond: the condition of the images as they are.
        seed: image i draws from the seed `seed + i`.
    """

    images: Tensor
    plan: Plan
    cond: Any = None
    codec: Codec | None = None
    strength: float | None = None
    known: Tensor | None = None
    repeats: int = 1
    source: Plan | None = None
    source_cond: Any = None
    seed: int = 0

    @property
    def x0(self) -> Tensor:
        """The images as the model sees them."""
        return self.images if self.codec is None else self.codec.encode(self.images)

    def share(self, default: float) -> float:
        """The strength, or that of a task by default."""
        return default if self.strength is None else self.strength

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + len(self.images))

    def pictures(self, x: Tensor) -> Tensor:
        """What the model made, as images."""
        return x if self.codec is None else self.codec.decode(x)


def _image_to_image(edit: Edit) -> Tensor:
    x0, plan = edit.x0, edit.plan
    noise = seeded_noise(edit.seeds, x0.shape[1:], device=x0.device)
    x = image_to_image(
        plan.denoiser,
        x0,
        noise,
        strength=edit.share(STRENGTH),
        solver=plan.solver,
        sigmas=plan.sigmas,
        cond=edit.cond,
        seeds=edit.seeds,
    )
    return edit.pictures(x)


def _inpaint(edit: Edit) -> Tensor:
    if edit.known is None:
        raise ValueError("inpainting needs a mask")
    x0, plan, levels = edit.x0, edit.plan, levels_left(edit.plan.sigmas, edit.share(1.0))
    known = Known(edit.images, edit.known)
    if len(levels) == 1:
        return edit.images
    noise = seeded_noise(edit.seeds, x0.shape[1:], device=x0.device)
    # All levels begin with noise alone, fewer with what the images show where they are to be made anew.
    begin = None if len(levels) == len(plan.sigmas) else noised(x0, plan.sigmas, edit.share(1.0), noise)
    if takes_mask(plan.denoiser):
        cond = {**edit.cond, "channels": mask_channels(edit, known)}
        if begin is None:
            x = sample(plan.denoiser, noise, solver=plan.solver, sigmas=levels, cond=cond, seeds=edit.seeds)
        else:
            x = run(plan.denoiser, begin, plan.solver, cond, edit.seeds)
        return known.put_into(edit.pictures(x), torch.zeros_like(edit.images), 0.0)
    mask = known.mask
    if edit.codec is not None:
        # A latent is known where all of its pixels are.
        mask = 1 - interpolate(1 - mask, x0.shape[2:], mode="area").ceil()
    x = inpaint(
        plan.denoiser,
        Known(x0, mask),
        noise,
        solver=plan.solver,
        sigmas=levels,
        cond=edit.cond,
        seeds=edit.seeds,
        start=None if begin is None else begin.x,
        repeats=edit.repeats,
    )
    return known.put_into(edit.pictures(x), torch.zeros_like(edit.images), 0.0)


def takes_mask(denoiser: Any) -> bool:
    """Whether the network under a denoiser, guided or not, has input channels for a mask and a masked image."""
    inner = getattr(denoiser, "denoiser", denoiser)
    return getattr(getattr(inner, "model", None), "further_channels", 0) > 1


def mask_channels(edit: Edit, known: Known) -> Tensor:
    """The mask, 1 where the latent is to be made, and the latents of the image without it: `[B, 1 + C, h, w]`."""
    assert edit.codec is not None
    masked = edit.codec.encode(known.x0 * known.mask)
    mask = interpolate(1 - known.mask, masked.shape[2:]).expand(len(masked), 1, *masked.shape[2:])
    return torch.cat([mask, masked], dim=1)


def encoding_plan(
    model: Denoiser,
    *,
    num_steps: int | None = None,
    solver: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
) -> Plan:
    """Say how to encode with `model`: a distilled encoder on its own levels, another model by a solver of the ODE.

    Args:
        model: from `load_denoiser`.
        num_steps: as in `generation.plan`; a distilled encoder has its own.
        solver: as in `generation.plan`; a distilled encoder brings its own.
        schedule: as in `generation.plan`; it must end above 0, as by default "polynomial" does.

    Raises:
        ValueError: as `generation.plan`, or a student for sampling.
    """
    own = model.distilled
    if own is None:
        # A flow map is asked for the denoised image: its own steps lead down only.
        solver = solver or {"name": "euler"}
        return plan(model, num_steps=num_steps, solver=solver, schedule=schedule or {"name": "polynomial"})
    if own.sampler != "encoder":
        raise ValueError(
            "a student for sampling cannot encode: encode with its teacher, or with a student of sampler=encoder"
        )
    return Plan(model, Euler(), torch.tensor(own.sigmas, dtype=torch.float64))


def _codes(edit: Edit, top: float) -> Tensor:
    """The images carried to the level `top`, over that level."""
    source = edit.source
    if source is None:
        raise ValueError("encoding needs a denoiser to encode with")
    distilled = source.denoiser.distilled
    if distilled is not None and all(abs(top / level - 1) > LEVEL_TOLERANCE for level in distilled.sigmas):
        raise ValueError(
            f"this encoder stops at the levels {', '.join(f'{level:g}' for level in distilled.sigmas[:-1])}, but the "
            f"result begins at {top:g}: choose a strength, or steps, that begin at one of them"
        )
    levels = levels_up_to(source.sigmas, top)
    return encode(source.denoiser, edit.x0, sigmas=levels, solver=source.solver, cond=edit.source_cond)


def _reconstruct(edit: Edit) -> Tensor:
    way = edit.source
    if way is None or way.denoiser.distilled is not None:
        way = edit.plan  # a distilled encoder cannot decode
    x = sample(
        way.denoiser, _codes(edit, float(way.sigmas[0])), solver=way.solver, sigmas=way.sigmas, cond=edit.source_cond
    )
    return edit.pictures(x)


def _transfer(edit: Edit) -> Tensor:
    plan, levels = edit.plan, levels_left(edit.plan.sigmas, edit.share(STRENGTH))
    x = edit.x0
    if len(levels) > 1:
        codes = _codes(edit, float(levels[0]))
        x = sample(plan.denoiser, codes, solver=plan.solver, sigmas=levels, cond=edit.cond, seeds=edit.seeds)
    return edit.pictures(x)


TASKS: dict[str, Callable[[Edit], Tensor]] = {
    "image_to_image": torch.no_grad()(_image_to_image),
    "inpaint": torch.no_grad()(_inpaint),
    "reconstruct": torch.no_grad()(_reconstruct),
    "style_transfer": torch.no_grad()(_transfer),
}
"""Edits by name; each maps an `Edit` to images `[B, C, H, W]`."""
