"""Stage 2: a model of few sampling steps, by halving them again and again, or by a method of one round.

    diffdistill distill-steps experiment=digits/stage2 teacher=runs/stage1 out=runs/stage2
    diffdistill distill-steps experiment=digits/trajectory teacher=runs/stage1 out=runs/trajectory
    diffdistill distill-steps experiment=digits/encoder out=runs/encoder

The third distils encoders, which carry images to the noise that leads to them. method=halving, trajectory, consistency
or flow_map chooses the method, and brings its settings.
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
from diffdistill.progressive import methods
from diffdistill.progressive.methods import METHODS
from diffdistill.registry import choose
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
    options = choose("method", settings["method"], METHODS).__dataclass_fields__
    return methods.distill(
        teacher,
        data,
        Run(settings["out"], settings, inputs=inputs_of(settings)),
        method=settings["method"],
        options={name: settings[name] for name in options if name in settings},
        schedule=lambda num_steps: schedule_for(teacher, {"num_steps": num_steps, **settings["schedule"]}),
        weighting=make_weighting(settings["weighting"], sigma_data=teacher.sigma_data),
        trainer=settings["trainer"],
        # An encoder makes no pictures.
        on_samples=None if settings.get("sampler") == "encoder" else preview(teacher, **settings["preview"]),
        provenance=lambda stage: provenance(config, stage),
    )


@command("distill_steps")
def main(config: DictConfig) -> None:
    for num_steps, path in distill(config).items():
        print(f"the student of {num_steps or 'any number of'} step{'s' * (num_steps != 1)} is {path}")


if __name__ == "__main__":
    main()
