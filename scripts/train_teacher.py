"""Train a teacher by denoising, with label dropout so that it can be guided.

    diffdistill train-teacher experiment=digits/teacher out=runs/teacher

Running the same command again continues the run; with a larger trainer.updates it extends one that is finished.
"""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import provenance
from diffdistill import train_teacher
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of

OPTIONS = ("trainer", "init", "noise_levels", "weighting", "label_dropout", "preview")


def train(config: DictConfig) -> str:
    """Train a teacher and return its path."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if not run.finished:
        options = {name: settings[name] for name in OPTIONS}
        train_teacher(settings["model"], settings["data"], out=run, made_by=partial(provenance, config), **options)
    return str(run.path / "model.safetensors")


@command("train_teacher")
def main(config: DictConfig) -> None:
    print(f"the teacher is {train(config)}")


if __name__ == "__main__":
    main()
