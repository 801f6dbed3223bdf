"""Stage 2: halve the number of sampling steps again and again, each student the next teacher.

    diffdistill distill-steps experiment=digits/stage2 teacher=runs/stage1 out=runs/stage2
    diffdistill distill-steps experiment=digits/encoder out=runs/encoder

The second distils encoders, which carry images to the noise that leads to them.
Running the same command again continues the run, inside the stage where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.models import load_model
from common.results import check_data, provenance
from diffdistill.data import load_data
from diffdistill.interop.diffusers import add_adapters
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.progressive.stage2 import encoder_grid
from diffdistill.sampling.generation import preview
from diffdistill.sampling.plans import schedule_for
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of
from diffdistill.training.weighting import make_weighting


def distill(config: DictConfig) -> dict[int, Path]:
    """Run stage 2 and return the student's path for each number of steps."""
    settings = plain(config)
    data, teacher = load_data(**settings["data"]), load_model(settings, "teacher", trains=True)
    check_data(data, teacher)
    if isinstance(settings["lora"], dict):
        add_adapters(teacher, **settings["lora"])
    sigmas = schedule_for(teacher, {"num_steps": settings["start_steps"], **settings["schedule"]})
    encoder = settings["sampler"] == "encoder"  # which makes no pictures
    halving = Halving(
        sigmas=encoder_grid(sigmas, teacher.sigma_min) if encoder else sigmas,
        sampler=settings["sampler"],
        weighting=make_weighting(settings["weighting"], sigma_data=teacher.sigma_data),
        trainer=settings["trainer"],
        stages=settings["stages"] or {},
        last=settings["last_steps"],
    )
    return halve_steps(
        teacher,
        data,
        halving,
        Run(settings["out"], settings, inputs=inputs_of(settings)),
        on_samples=None if encoder else preview(teacher, **settings["preview"]),
        provenance=lambda stage: provenance(config, stage),
    )


@command("distill_steps")
def main(config: DictConfig) -> None:
    for num_steps, path in distill(config).items():
        print(f"the student of {num_steps} step{'s' * (num_steps > 1)} is {path}")


if __name__ == "__main__":
    main()
