"""Edit pictures, and write them before and after as PNG, and each result by itself.

diffdistill edit task=inpaint model=digits-student-4 num_steps=null out=runs/inpainted
diffdistill edit task=style_transfer label=7 num_steps=64 out=runs/sevens
diffdistill edit task=style_transfer label=7 model=digits-student-4 num_steps=null encoder.model=digits-encoder-4
diffdistill edit task=inpaint model=shapes-student-4 data=shapes num_steps=null out=runs/shapes
diffdistill edit task=reconstruct w=null num_steps=256 schedule=polynomial encoder.model=digits-encoder-4
diffdistill edit task=image_to_image model=models/four-steps prompt="a fox" images=cat.png num_steps=null w=6.5
diffdistill edit task=inpaint images=photos mask=masks original_size=true

Pictures may have any size: of each the largest part with the shape that the model takes is cut out of its centre and
resized. With `original_size=true` the result is put back where it was cut out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.models import adapted
from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.devices import device_of
from diffdistill.editing.inputs import Editor, first_images, load_editor
from diffdistill.editing.pictures import (
    Edited,
    Picture,
    first_pictures,
    known_of,
    pictures_of,
    read_masks,
    read_pictures,
    say_what_is_cut,
)
from diffdistill.editing.session import TASKS, Edit, encoding_plan, takes_mask
from diffdistill.registry import choose
from diffdistill.reports.pictures import save_grid
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import chosen_labels

ENCODED = ("reconstruct", "style_transfer")
"""Tasks that begin with encoding."""
OF_TASKS = {
    "mask": ("inpaint",),
    "repeats": ("inpaint",),
    "strength": ("image_to_image", "inpaint", "style_transfer"),
    "label": ("image_to_image", "inpaint", "style_transfer"),
    "prompt": ("image_to_image", "inpaint", "style_transfer"),
    "source_prompt": ENCODED,
    "encoder.model": ENCODED,
}
"""Settings that only some tasks read."""
REPEATS = 5
NUM_IMAGES = 10


def check_unused(settings: dict[str, Any], editor: Editor) -> None:
    """Refuse a setting that would have no effect."""
    given = {**settings, "encoder.model": settings["encoder"]["model"]}
    for name, tasks in OF_TASKS.items():
        if given[name] is not None and settings["task"] not in tasks:
            raise ValueError(f"{name} has no effect on task={settings['task']}: it is for {', '.join(tasks)}")
    if settings["repeats"] is not None and takes_mask(editor.denoiser):
        raise ValueError("repeats has no effect on a model with channels for a mask: leave it out")
    for name in ("original_size", "background"):
        if settings[name] and settings["images"] is None:
            raise ValueError(f"{name} is for pictures: give images=PATH")


def conditions(settings: dict[str, Any], labels: torch.Tensor | None, count: int, editor: Editor) -> Any:
    """What the images show, and what the result shall show."""
    if editor.prompts is not None:
        if settings["label"] is not None:
            raise ValueError("this model is conditioned on text: give prompt=, and no label")
        before = editor.prompts([settings["source_prompt"] or ""] * count)
        if settings["task"] == "reconstruct":
            return before, before
        if settings["prompt"] is None:
            raise ValueError("this model is conditioned on text: give prompt=")
        return before, editor.prompts([settings["prompt"]] * count)
    given = next((name for name in ("prompt", "source_prompt") if settings[name] is not None), None)
    if given is not None:
        raise ValueError(
            f"this model is not conditioned on text: leave out {given}=, or give the pipeline= of a latent one"
        )
    if settings["label"] is None:
        return labels, labels
    return labels, chosen_labels(settings["label"], count, editor.denoiser)


def edit(settings: dict[str, Any]) -> Edited:
    """The images before and after, and between them what is known of those to be inpainted."""
    task, device = choose("task", settings["task"], TASKS), device_of(settings["device"])
    editor = load_editor(settings["model"], pipeline=settings["pipeline"], device=device)
    adapted(editor.denoiser, settings)
    check_unused(settings, editor)
    model, size, labels, count = editor.denoiser, editor.shape[1:], None, settings["num_images"]
    pictures: list[Picture] = []
    if settings["images"] is not None:
        reading = {"channels": editor.shape[0], "background": settings["background"] or "white"}
        pictures = first_pictures(read_pictures(settings["images"], **reading), count)
        images = torch.stack([picture.fitted(size) for picture in pictures])
    else:
        images, labels = first_images(
            load_data(**settings["data"]), NUM_IMAGES if count is None else count, editor.shape
        )
        labels = labels.to(device) if model.num_classes else None
        pictures = pictures_of(images)
    inpaints = settings["task"] == "inpaint"
    masks = read_masks(settings["mask"], pictures, size) if inpaints else []
    say_what_is_cut(pictures, masks, size)
    known = torch.stack([known_of(mask, size) for mask in masks]) if inpaints else None
    encoder = dict(settings["encoder"])
    name, needed = encoder.pop("model"), settings["task"] in ENCODED
    source = (load_denoiser(name, device=device) if name else model) if needed else None
    before, after = conditions(settings, labels, len(images), editor)
    options = {name: settings.get(name) for name in ("w", "solver", "schedule", "num_steps")}
    made = task(
        Edit(
            images=images.to(device),
            plan=plan(model, **options),
            cond=after.to(device) if isinstance(after, torch.Tensor) else after,
            codec=editor.codec,
            strength=settings["strength"],
            known=None if known is None else known.to(device),
            repeats=settings["repeats"] or REPEATS,
            source=None if source is None else encoding_plan(source, **encoder),
            source_cond=before,
            seed=settings["seed"],
        )
    ).cpu()
    between = {} if known is None else {"known": images * known}
    return Edited({"before": images, **between, "after": made}, pictures, masks)


@command("edit")
def main(config: DictConfig) -> None:
    settings = plain(config)
    edited, out = edit(settings), Path(settings["out"])
    rows, grid = edited.rows, out / f"{settings['task']}.png"
    save_grid(torch.cat([*rows.values()]), grid, columns=len(rows["before"]), row_captions=tuple(rows))
    folder = edited.save(out / settings["task"], own_size=settings["original_size"])
    if settings["task"] == "reconstruct":
        error = (rows["after"] - rows["before"]).square().mean()
        print(f"PSNR {10 * torch.log10(4 / error):.1f} dB")
    logging.getLogger("diffdistill").info("each result by itself is in %s", folder)
    print(grid)


if __name__ == "__main__":
    main()
