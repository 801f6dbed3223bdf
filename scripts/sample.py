"""Draw samples from a model by name or path.

    diffdistill sample model=digits-student-4 w=1 num_samples=10000 seed=0 out=runs/samples save=npz

Running the same command again continues an interrupted run; a larger num_samples goes on from there. `torchrun` spreads
the batches over processes.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.checks import several
from common.command import command
from common.configs import plain
from common.speed import faster
from diffdistill import load_denoiser
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.registry import choose
from diffdistill.sampling.generation import makes_pictures
from diffdistill.sampling.plans import plan, sampling_inputs
from diffdistill.sampling.samples import WRITERS, chosen_labels, draw_to
from diffdistill.training import Run

HARMLESS = ("device", "out", "save", "num_samples", "compile", "cuda_graph")


@command("sample")
def main(config: DictConfig) -> None:
    settings = plain(config)
    model = load_denoiser(settings["model"], device=device_of(settings["device"]))
    planned = plan(
        model,
        w=settings["w"],
        solver=settings.get("solver"),
        schedule=settings.get("schedule"),
        num_steps=settings["num_steps"],
        start=settings["start"],
        guidance=settings["guidance"],
    )
    planned = faster(planned, settings)
    writers = [choose("kind of output", kind, WRITERS) for kind in several(settings["save"])]
    if not writers:
        raise ValueError(f"save must name at least one of {', '.join(WRITERS)}")
    if not makes_pictures(model) and writers != [WRITERS["npz"]]:
        raise ValueError(f"samples of this model are latents {list(model.data_shape)}, not pictures: give save=npz")
    labels = chosen_labels(settings["labels"], settings["num_samples"], model)
    seeds = range(settings["seed"], settings["seed"] + settings["num_samples"])
    run = Run(settings["out"], settings, inputs=sampling_inputs(settings), harmless=HARMLESS)
    size = settings["batch_size"]
    samples = draw_to(run.path / "parts", planned, seeds, labels, key=run.digest, batch_size=size)
    if rank() == 0:
        for write in writers:
            print(write(samples, run.path))


if __name__ == "__main__":
    main()
