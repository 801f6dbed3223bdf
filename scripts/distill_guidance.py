"""Stage 1: distil a guided teacher into one model that takes the guidance weight as an input.

    diffdistill distill-guidance experiment=digits/stage1 teacher=digits-teacher out=runs/stage1

Running the same command again continues the run; with a larger trainer.updates it extends one that is finished.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import finish, initialize, pictures_of
from diffdistill import load_denoiser
from diffdistill.data import check_data, load_data
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.interop.diffusers import add_adapters
from diffdistill.models import guidance_student, make_guidance
from diffdistill.registry import choose
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.inputs import inputs_of
from diffdistill.training.weighting import make_weighting
from diffdistill.workflows.levels import noise_levels_for


def distill(config: DictConfig) -> str:
    """Run stage 1 and return the path of the student."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if run.finished:
        return str(run.path / "model.safetensors")
    data, teacher, w = load_data(**settings["data"]), load_denoiser(settings["teacher"]), settings["w"]
    check_data(data, teacher)
    student = guidance_student(teacher, tuple(w) if isinstance(w, list) else (w, w))
    initialize(student, settings["init"])
    if settings["lora"]:
        add_adapters(student, **settings["lora"])
    shares = {"data": 0.0, "trajectories": settings["inputs_share"]}
    guidance = dict(settings["guidance"])
    if "weak" in guidance:
        guidance["weak"] = load_denoiser(guidance["weak"])
    objective = GuidanceDistillation(
        make_guidance(guidance.pop("name"), teacher, **guidance),
        student,
        noise_levels=noise_levels_for(teacher, settings["noise_levels"]),
        weighting=make_weighting(settings["weighting"], sigma_data=teacher.sigma_data),
        trajectories=choose("inputs", settings["inputs"], shares),
        num_steps=settings["inputs_steps"],
    )
    trainer = TrainerConfig.from_dict(settings["trainer"])
    pictures = pictures_of(teacher, settings["preview"])
    model = Trainer(objective, data, trainer, run, on_samples=pictures, name="stage 1").train()
    return finish(model, run, config)


@command("distill_guidance")
def main(config: DictConfig) -> None:
    print(f"the guidance-conditioned model is {distill(config)}")


if __name__ == "__main__":
    main()
