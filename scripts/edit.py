"""Edit pictures, and write them before and after as PNG.

diffdistill edit task=inpaint model=digits-student-4 num_steps=null out=runs/inpainted
diffdistill edit task=style_transfer label=7 num_steps=64 out=runs/sevens
diffdistill edit task=style_transfer label=7 model=digits-student-4 num_steps=null encoder.model=digits-encoder-4
diffdistill edit task=inpaint model=shapes-student-4 data=shapes num_steps=null out=runs/shapes
diffdistill edit task=reconstruct w=null num_steps=256 schedule=polynomial encoder.model=digits-encoder-4
diffdistill edit task=image_to_image model=models/four-steps prompt="a fox" images=cat.png num_steps=null w=6.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.devices import device_of
from diffdistill.editing.inputs import Editor, first_images, load_editor, read_images, read_mask
from diffdistill.editing.session import TASKS, Edit, encoding_plan
from diffdistill.pictures import save_grid
from diffdistill.registry import choose
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import chosen_labels


def conditions(settings: dict[str, Any], labels: torch.Tensor | None, count: int, editor: Editor) -> Any:
    """What the images show, and what the result shall show."""
    if editor.prompts is not None:
        if settings["prompt"] is None or settings["label"] is not None:
            raise ValueError("this model is conditioned on text: give prompt=, and no label")
        return editor.prompts([settings["source_prompt"]] * count), editor.prompts([settings["prompt"]] * count)
    if settings["prompt"] is not None:
        raise ValueError(
            "this model is not conditioned on text: leave out prompt=, or give the pipeline= of a latent one"
        )
    if settings["label"] is None:
        return labels, labels
    return labels, chosen_labels(settings["label"], count, editor.denoiser)


def edit(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The images before and after, and between them what is known of those to be inpainted."""
    task, device = choose("task", settings["task"], TASKS), device_of(settings["device"])
    editor = load_editor(settings["model"], pipeline=settings["pipeline"], device=device)
    model, labels = editor.denoiser, None
    if settings["images"] is not None:
        images = read_images(settings["images"], editor.shape)
    else:
        images, labels = first_images(load_data(**settings["data"]), settings["num_images"], editor.shape)
        labels = labels.to(device) if model.num_classes else None
    encoder = dict(settings["encoder"])
    name, needed = encoder.pop("model"), settings["task"] in ("reconstruct", "style_transfer")
    source = (load_denoiser(name, device=device) if name else model) if needed else None
    before, after = conditions(settings, labels, len(images), editor)
    known = read_mask(settings["mask"], editor.shape[1:])
    options = {name: settings.get(name) for name in ("w", "solver", "schedule", "num_steps")}
    made = task(
        Edit(
            images=images.to(device),
            plan=plan(model, **options),
            cond=after.to(device) if isinstance(after, torch.Tensor) else after,
            codec=editor.codec,
            strength=settings["strength"],
            known=known.to(device),
            repeats=settings["repeats"],
            source=None if source is None else encoding_plan(source, **encoder),
            source_cond=before,
            seed=settings["seed"],
        )
    )
    between = {"known": images * known} if settings["task"] == "inpaint" else {}
    return {"before": images, **between, "after": made.cpu()}


@command("edit")
def main(config: DictConfig) -> None:
    settings = plain(config)
    rows = edit(settings)
    path = Path(settings["out"]) / f"{settings['task']}.png"
    save_grid(torch.cat([*rows.values()]), path, columns=len(rows["before"]), row_captions=tuple(rows))
    if settings["task"] == "reconstruct":
        error = (rows["after"] - rows["before"]).square().mean()
        print(f"PSNR {10 * torch.log10(4 / error):.1f} dB")
    print(path)


if __name__ == "__main__":
    main()
