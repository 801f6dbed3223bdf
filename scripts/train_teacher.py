"""Train a teacher by denoising, with label dropout so that it can be guided.

    diffdistill train-teacher experiment=digits/teacher out=runs/teacher

Running the same command again continues the run; with a larger trainer.updates it extends one that is finished.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import finish, initialize
from diffdistill.data import load_data
from diffdistill.models import build_denoiser, load_autoencoder
from diffdistill.sampling.generation import preview
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.denoising import Denoising
from diffdistill.training.inputs import inputs_of
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting


def train(config: DictConfig) -> str:
    """Train a teacher and return its path."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if run.finished:
        return str(run.path / "model.safetensors")
    data = load_data(**settings["data"])
    made = {**settings["model"], "data_shape": data.shape, "num_classes": data.num_classes}
    autoencoder = None if data.autoencoder is None else load_autoencoder(data.autoencoder)
    denoiser = build_denoiser(made, autoencoder=autoencoder)
    initialize(denoiser, settings["init"])
    objective = Denoising(
        denoiser,
        noise_levels=make_noise_levels(**settings["noise_levels"]),
        weighting=make_weighting(settings["weighting"], sigma_data=settings["model"]["preconditioning"]["sigma_data"]),
        label_dropout=settings["label_dropout"],
    )
    trainer = TrainerConfig.from_dict(settings["trainer"])
    pictures = preview(denoiser, **settings["preview"])
    model = Trainer(objective, data, trainer, run, on_samples=pictures, name="teacher").train()
    return finish(model, run, config)


@command("train_teacher")
def main(config: DictConfig) -> None:
    print(f"the teacher is {train(config)}")


if __name__ == "__main__":
    main()
