"""Measure samples, stored or drawn by a model on the way, against a reference.

    diffdistill evaluate samples=runs/samples/samples.npz features=digits_classifier
    diffdistill evaluate model=digits-student-4 w=1 num_samples=2000 features=digits_classifier measures=[fid,kid]
    diffdistill evaluate samples=DIR features=inception reference=references/cifar10-32x32.npz
    diffdistill evaluate samples=DIR captions=captions.txt clip=openai/clip-vit-base-patch16 measures=[]

`torchrun` spreads the images over processes.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.checks import check_file, refuse_unread, several
from common.command import command
from common.configs import plain
from common.models import load_model
from common.speed import faster
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.metrics.evaluate import EvaluationOptions, describe, evaluate, write_record
from diffdistill.metrics.sources import Sampler, StoredImages, open_images
from diffdistill.sampling.plans import plan

OF_SAMPLES = ("resolution", "background", "skip_damaged")
OF_MODELS = ("lora", "lora_strength", "precision", "channels_last", "compile", "cuda_graph", "seed")
PLAN = ("w", "num_steps", "solver", "schedule", "start")


@command("evaluate")
def main(config: DictConfig) -> None:
    settings = plain(config)
    if (settings["samples"] is None) == (settings["model"] is None):
        raise ValueError("give either samples=PATH (a folder, .zip or .npz) or model=NAME")
    if settings["samples"] is not None:
        refuse_unread("evaluate", settings, [*PLAN, *OF_MODELS], "on samples that are there: it is for model=")
    else:
        refuse_unread("evaluate", settings, OF_SAMPLES, "on what a model draws: it is for samples=PATH")
    settings["measures"] = several(settings["measures"])
    check_file(settings["out"], ".json")
    options = EvaluationOptions(**{name: settings[name] for name in EvaluationOptions.__dataclass_fields__})
    device = device_of(settings["device"])
    if settings["samples"] is not None:
        reading = {name: settings[name] for name in OF_SAMPLES if settings[name]}
        images = open_images(settings["samples"], **reading)
        source = StoredImages(images, limit=settings["num_samples"])
    else:
        planned = plan(load_model(settings, device=device), **{name: settings.get(name) for name in PLAN})
        source = Sampler(faster(planned, settings), settings["num_samples"] or 10_000, seed=settings["seed"])
    record = evaluate(source, options, data=settings["data"], device=device)
    if rank() == 0:
        print(describe(record))
        write_record(record, settings, settings["out"])


if __name__ == "__main__":
    main()
