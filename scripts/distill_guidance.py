"""Stage 1: distil a classifier-free-guided teacher into one model that takes the guidance weight as an input.

    diffdistill distill-guidance experiment=digits/stage1 teacher=digits-teacher out=runs/stage1

Running the same command again continues the run; with a larger trainer.updates it extends one that is finished.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.models import load_model
from common.results import check_data, finish, initialize
from diffdistill.data import load_data
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.interop.diffusers import add_adapters
from diffdistill.models import guidance_student
from diffdistill.sampling.generation import preview
from diffdistill.sampling.plans import schedule_for
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.inputs import inputs_of
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting


def noise_levels(settings: dict[str, Any], teacher: Any) -> Any:
    """The distribution of sigma; "on_schedule" draws from the levels of a schedule, given by its options."""
    options = dict(settings)
    if options["name"] == "on_schedule":
        options["sigmas"] = schedule_for(teacher, options.pop("schedule"))
    return make_noise_levels(**options)


def distill(config: DictConfig) -> str:
    """Run stage 1 and return the path of the student."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if run.finished:
        return str(run.path / "model.safetensors")
    data, teacher, w = load_data(**settings["data"]), load_model(settings, "teacher", trains=True), settings["w"]
    check_data(data, teacher)
    student = guidance_student(teacher, tuple(w) if isinstance(w, list) else (w, w))
    initialize(student, settings["init"])
    if isinstance(settings["lora"], dict):
        add_adapters(student, **settings["lora"])
    objective = GuidanceDistillation(
        teacher,
        student,
        noise_levels=noise_levels(settings["noise_levels"], teacher),
        weighting=make_weighting(settings["weighting"], sigma_data=teacher.sigma_data),
    )
    trainer = TrainerConfig.from_dict(settings["trainer"])
    pictures = preview(teacher, **settings["preview"])
    model = Trainer(objective, data, trainer, run, on_samples=pictures, name="stage 1").train()
    return finish(model, run, config)


@command("distill_guidance")
def main(config: DictConfig) -> None:
    print(f"the guidance-conditioned model is {distill(config)}")


if __name__ == "__main__":
    main()
