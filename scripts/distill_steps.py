"""Stage 2: a model of few sampling steps, by halving them again and again, or by a method of one round.

    diffdistill distill-steps experiment=digits/stage2 teacher=runs/stage1 out=runs/stage2
    diffdistill distill-steps experiment=digits/trajectory teacher=runs/stage1 out=runs/trajectory
    diffdistill distill-steps experiment=digits/encoder out=runs/encoder

The third distils encoders, which carry images to the noise that leads to them. method=halving, trajectory, consistency
or flow_map chooses the method, and brings its settings.
Running the same command again continues the run, inside the stage where it stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.models import load_model, trained_adapters
from common.results import provenance
from diffdistill.progressive.methods import METHODS
from diffdistill.registry import choose
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of
from diffdistill.workflows.steps import distilled_files


def distill(config: DictConfig) -> dict[int, Path]:
    """Run stage 2 and return the student's path for each number of steps."""
    settings = plain(config)
    options = choose("method", settings["method"], METHODS).__dataclass_fields__
    return distilled_files(
        load_model(settings, "teacher", trains=True),
        settings["data"],
        Run(settings["out"], settings, inputs=inputs_of(settings)),
        options={name: settings[name] for name in options if name in settings},
        made_by=partial(provenance, config),
        **{name: settings[name] for name in ("method", "trainer", "schedule", "weighting", "preview")},
        lora=trained_adapters(settings),
    )


@command("distill_steps")
def main(config: DictConfig) -> None:
    for num_steps, path in distill(config).items():
        print(f"the student of {num_steps or 'any number of'} step{'s' * (num_steps != 1)} is {path}")


if __name__ == "__main__":
    main()
