"""Train the predictor of a learned solver for a denoiser.

    diffdistill train-amed experiment=digits/amed_5nfe out=runs/amed_5nfe

Running the same command again continues the run. The result is `out/predictor.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.results import provenance
from diffdistill import load_denoiser
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.learned import Rescue, initial_levels, make_learned, make_task, save_predictor, trained
from diffdistill.models import guided
from diffdistill.tables.reproduction import Files
from diffdistill.tables.tables import Need
from diffdistill.training import NonFiniteLossError, Run, Trainer, TrainerConfig
from diffdistill.training.inputs import inputs_of


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
    denoiser = load_denoiser(model, device=device_of(settings["trainer"]["device"]))
    if settings["w"] is not None:
        denoiser = guided(denoiser, settings["w"])
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    start = settings["start"]
    schedule = {**ends, **settings["schedule"], **({"sigma_max": start["sigma"]} if start else {})}
    sigmas, predictor = initial_levels(schedule, settings["num_steps"], settings["predictor"])
    learned = make_learned(
        settings["form"],
        inner=settings["inner"],
        predictor=predictor,
        start=start,
        thresholding=settings["thresholding"],
        sigmas=sigmas,
    )
    task = make_task(learned, denoiser, schedule, **settings["objective"])
    trainer = Trainer(task.objective, task.data, TrainerConfig.from_dict(settings["trainer"]), run, name="amed")
    rescue = Rescue(learned, task, denoiser)
    try:
        result = trainer.train()
    except NonFiniteLossError as error:
        left = rescue.last_good(run, provenance(config, run))
        path = run.path / "last_good.safetensors"
        if rank() == 0:
            save_predictor(left.learned, path)
        raise NonFiniteLossError(
            f"{error}; seed {trainer.config.seed}, step {left.step} to sigma = {left.sigma:.4g}; "
            f"the predictor after {left.update} updates is {path}",
            update=error.update,
        ) from None
    learned = trained(learned, result, denoiser, provenance(config, run))
    if rank() == 0:
        save_predictor(learned, run.path / "predictor.safetensors")
    run.finish(["predictor.safetensors"], keep=1)
    print(f"the predictor for {learned.nfe} evaluations is {run.path / 'predictor.safetensors'}")


main = command("train_amed")(train)

if __name__ == "__main__":
    main()
