"""Draw samples from a model by name or path.

    diffdistill sample model=digits-student-4 w=1 num_samples=10000 seed=0 out=runs/samples save=npz

    diffdistill sample model=models/four-steps prompt="a fox in the snow" num_samples=4 out=runs/foxes

Running the same command again continues an interrupted run; a larger num_samples goes on from there. `torchrun` spreads
the batches over processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from common.checks import several
from common.command import command
from common.configs import plain
from common.models import adapted
from common.speed import faster
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.editing.inputs import Editor, load_editor
from diffdistill.registry import choose
from diffdistill.sampling.generation import makes_pictures
from diffdistill.sampling.plans import plan, sampling_inputs
from diffdistill.sampling.samples import WRITERS, chosen_labels, draw_to
from diffdistill.training import Run

HARMLESS = ("device", "out", "save", "num_samples", "compile", "cuda_graph")


def condition_for(settings: dict[str, Any], editor: Editor) -> Any:
    """What the samples show: labels, or texts of a text model."""
    if editor.prompts is None:
        if settings["prompt"] is not None:
            raise ValueError("this model takes no text: leave out prompt=, or give the pipeline= of a latent one")
        return chosen_labels(settings["labels"], settings["num_samples"], editor.denoiser)
    if settings["prompt"] is None or settings["labels"] is not None:
        raise ValueError("this model is conditioned on text: give prompt=, and no labels")
    with torch.no_grad():
        return editor.prompts([str(prompt) for prompt in several(settings["prompt"])])


@command("sample")
def main(config: DictConfig) -> None:
    settings = plain(config)
    editor = load_editor(settings["model"], pipeline=settings["pipeline"], device=device_of(settings["device"]))
    model, codec = adapted(editor.denoiser, settings), editor.codec
    condition = condition_for(settings, editor)
    planned = plan(
        model,
        w=settings["w"],
        solver=settings.get("solver"),
        schedule=settings.get("schedule"),
        num_steps=settings["num_steps"],
        start=settings["start"],
        guidance=settings["guidance"],
    )
    planned = replace(faster(planned, settings), codec=codec)
    writers = [choose("kind of output", kind, WRITERS) for kind in several(settings["save"])]
    if not writers:
        raise ValueError(f"save must name at least one of {', '.join(WRITERS)}")
    if codec is None and not makes_pictures(model) and writers != [WRITERS["npz"]]:
        raise ValueError(f"samples of this model are latents {list(model.data_shape)}, not pictures: give save=npz")
    seeds = range(settings["seed"], settings["seed"] + settings["num_samples"])
    run = Run(settings["out"], settings, inputs=sampling_inputs(settings), harmless=HARMLESS)
    key = f"{run.digest}.bf16" if planned.bf16 else run.digest  # which precision=auto leaves to the device
    samples = draw_to(run.path / "parts", planned, seeds, condition, key=key, batch_size=settings["batch_size"])
    if rank() == 0:
        for write in writers:
            print(write(samples, run.path))


if __name__ == "__main__":
    main()
