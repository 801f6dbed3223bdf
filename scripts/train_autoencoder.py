"""Train the autoencoder of a latent model.

    diffdistill train-autoencoder experiment=shapes/autoencoder out=runs/autoencoder

Running the same command again continues the run. `diffdistill cache-latents` then encodes data with the result.
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import finish, initialize
from diffdistill.data import load_data
from diffdistill.models import build_autoencoder, load_autoencoder, save_autoencoder
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.inputs import inputs_of
from diffdistill.training.reconstruction import Reconstruction

SCALE_IMAGES = 5000


def train(config: DictConfig) -> str:
    """Train an autoencoder and return its path."""
    settings = plain(config)
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if run.finished:
        return str(run.path / "model.safetensors")
    data = load_data(**settings["data"])
    autoencoder = build_autoencoder({**settings["model"], "data_shape": data.shape})
    initialize(autoencoder, settings["init"], load_autoencoder)
    objective = Reconstruction(
        autoencoder,
        noise=settings["noise"],
        prior=settings["prior"],
    )
    count = 0 if settings["preview"] is None else settings["preview"]["num_samples"]
    shown = [data[i]["x"] for i in range(min(count, len(data)))]

    def on_samples(model: torch.nn.Module) -> torch.Tensor:
        images = torch.stack(shown).to(next(model.parameters()).device)
        return torch.cat([images, model.decode(model.encode(images)).cpu().to(images)])

    trainer = Trainer(
        objective,
        data,
        TrainerConfig.from_dict(settings["trainer"]),
        run,
        on_samples=on_samples if shown else None,
        name="autoencoder",
    )
    model = trainer.train()
    model.fit_scale(torch.stack([data[i]["x"] for i in range(min(SCALE_IMAGES, len(data)))]).to(trainer.device))
    return finish(model, run, config, save=save_autoencoder)


@command("train_autoencoder")
def main(config: DictConfig) -> None:
    print(f"the autoencoder is {train(config)}")


if __name__ == "__main__":
    main()
