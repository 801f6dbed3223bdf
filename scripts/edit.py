"""Edit pictures, and write them before and after as PNG.

python scripts/edit.py task=inpaint model=digits-student-4 num_steps=null out=runs/inpainted
python scripts/edit.py task=style_transfer label=7 num_steps=64 out=runs/sevens
python scripts/edit.py task=style_transfer label=7 model=digits-student-4 num_steps=null encoder.model=digits-encoder-4
python scripts/edit.py task=inpaint model=shapes-student-4 data=shapes num_steps=null out=runs/shapes
python scripts/edit.py task=reconstruct w=null num_steps=256 schedule=polynomial encoder.model=digits-encoder-4
python scripts/edit.py task=image_to_image model=models/four-steps prompt="a fox" images=cat.png num_steps=null w=6.5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common import command, plain
from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.denoiser import image_shape
from diffdistill.devices import device_of
from diffdistill.editing.inputs import read_images, read_mask
from diffdistill.editing.session import TASKS, Edit, encoding_plan
from diffdistill.generation import plan
from diffdistill.pictures import save_grid
from diffdistill.registry import choose
from diffdistill.samples import chosen_labels


def conditions(settings: dict[str, Any], labels: torch.Tensor | None, count: int, model: Any, parts: Any) -> Any:
    """What the images show, and what the result shall show."""
    if parts is not None and parts.prompts is not None:
        if settings["prompt"] is None or settings["label"] is not None:
            raise ValueError("this model is conditioned on text: give prompt=, and no label")
        return parts.prompts([settings["source_prompt"]] * count), parts.prompts([settings["prompt"]] * count)
    if settings["prompt"] is not None:
        raise ValueError(
            "this model is not conditioned on text: leave out prompt=, or give the pipeline= of a latent one"
        )
    if settings["label"] is None:
        return labels, labels
    return labels, chosen_labels(settings["label"], count, model)


def edit(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The images before and after, and between them what is known of those to be inpainted."""
    task, device = choose("task", settings["task"], TASKS), device_of(settings["device"])
    folder = settings["pipeline"] or settings["model"]
    parts = None
    if (Path(folder) / "model_index.json").is_file():
        from diffdistill.interop.diffusers import load_pipeline

        parts = load_pipeline(folder)
        parts.pipeline.to(device)
    own = parts is not None and folder == settings["model"]
    model = parts.denoiser.to(device) if own else load_denoiser(settings["model"], device=device)
    codec = model.codec if parts is None else parts.codec
    shape, labels = image_shape(model.data_shape, codec), None
    if settings["images"] is not None:
        images = read_images(settings["images"], shape)
    else:
        data = load_data(**settings["data"])
        if tuple(data.shape) != shape:
            raise ValueError(f"the model takes images {list(shape)}, but the data has {list(data.shape)}: choose data=")
        if not 1 <= settings["num_images"] <= len(data):
            raise ValueError(f"num_images={settings['num_images']}: the data has {len(data)} images")
        images = torch.stack([data[i]["x"] for i in range(settings["num_images"])])
        labels = torch.stack([data[i]["y"] for i in range(settings["num_images"])]) if model.num_classes else None
    scheme = {"w": settings["w"], "solver": settings.get("solver"), "schedule": settings.get("schedule")}
    encoder = dict(settings["encoder"])
    name, needed = encoder.pop("model"), settings["task"] in ("reconstruct", "style_transfer")
    source = (load_denoiser(name, device=device) if name else model) if needed else None
    before, after = conditions(settings, None if labels is None else labels.to(device), len(images), model, parts)
    known = read_mask(settings["mask"], shape[1:])
    made = task(
        Edit(
            images=images.to(device),
            plan=plan(model, num_steps=settings["num_steps"], **scheme),
            cond=after.to(device) if isinstance(after, torch.Tensor) else after,
            codec=codec,
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
