"""Train the predictor of a learned solver for a denoiser.

    diffdistill train-amed experiment=digits/amed_5nfe out=runs/amed_5nfe

Running the same command again continues the run. The result is `out/predictor.safetensors`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import provenance
from diffdistill import train_solver
from diffdistill.tables.reproduction import Files
from diffdistill.tables.tables import Need
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of

OPTIONS = ("num_steps", "form", "w", "inner", "predictor", "schedule", "start", "thresholding", "objective", "trainer")


def train(config: DictConfig) -> None:
    settings = plain(config)
    model, source = settings["model"], settings["source"]
    if source and not Path(model).exists():
        raise FileNotFoundError(f"{model} is not there: get it from {source}, or say model=PATH")
    run = Run(settings["out"], settings, inputs=inputs_of(settings))
    if run.finished:
        print(f"the predictor is {run.path / 'predictor.safetensors'}")
        return
    if Path(model).exists():
        Files(run.path / "files.json").check(Need(model, source or "", settings["sha256"]))
    options = {name: settings[name] for name in OPTIONS}
    learned = train_solver(model, out=run, made_by=partial(provenance, config), **options)
    print(f"the predictor for {learned.nfe} evaluations is {run.path / 'predictor.safetensors'}")


main = command("train_amed")(train)

if __name__ == "__main__":
    main()
