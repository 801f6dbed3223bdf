"""Stage 1: distil a guided teacher into one model that takes the guidance weight as an input.

    diffdistill distill-guidance experiment=digits/stage1 teacher=digits-teacher out=runs/stage1

Running the same command again continues the run; with a larger trainer.updates it extends one that is finished.
"""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.models import load_model, trained_adapters
from common.results import provenance
from diffdistill import distill_guidance
from diffdistill.registry import choose
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of

OPTIONS = ("trainer", "guidance", "init", "noise_levels", "weighting", "preview")


def distill(config: DictConfig) -> str:
    """Run stage 1 and return the path of the student."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if not run.finished:
        shares = {"data": 0.0, "trajectories": settings["inputs_share"]}
        distill_guidance(
            load_model(settings, "teacher", trains=True),
            settings["data"],
            w_range=settings["w"],
            trajectories=choose("inputs", settings["inputs"], shares),
            num_steps=settings["inputs_steps"],
            lora=trained_adapters(settings),
            out=run,
            made_by=partial(provenance, config),
            **{name: settings[name] for name in OPTIONS},
        )
    return str(run.path / "model.safetensors")


@command("distill_guidance")
def main(config: DictConfig) -> None:
    print(f"the guidance-conditioned model is {distill(config)}")


if __name__ == "__main__":
    main()
