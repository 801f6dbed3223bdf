"""Compute the means and covariances that the analytic start needs, from data or from samples of a model.

    diffdistill gaussian-stats model=digits-teacher out=runs/statistics

The result is `out/statistics.safetensors`, for `load_gaussian`; with `beside=true` also where `start=` looks for it.
Running the same command again continues the run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from common.arguments import as_given
from common.checks import refuse_unread
from common.command import command
from common.configs import plain
from common.typed import typed_command
from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.devices import device_of
from diffdistill.sampling.plans import plan, statistics_of
from diffdistill.sampling.samples import chosen_labels, draw_to
from diffdistill.solvers import GaussianStatistics, save_gaussian, shipped_gaussians
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of


@command("gaussian_stats")
def main(config: DictConfig) -> None:
    settings = plain(config)
    if settings["samples"] is None:
        refuse_unread("gaussian_stats", settings, ["num_steps"], "on statistics of data: it is for samples=NUMBER")
    if settings["form"] != "low_rank":
        refuse_unread("gaussian_stats", settings, ["rank"], f"on form={settings['form']}: it is for low_rank")
    path = Path(statistics_of(settings["model"]))
    if settings["beside"] and str(path) in shipped_gaussians():
        raise ValueError(f"statistics of {path} come with the package: leave out beside")
    run = Run(settings["out"], settings, inputs=inputs_of(settings), harmless=("device", "out", "beside"))
    if settings["samples"] is None:
        data = load_data(**settings["data"])
        x, y = data.tensors().values()
        classes = data.num_classes
    else:
        model, count = load_denoiser(settings["model"], device=device_of(settings["device"])), settings["samples"]
        options = {name: settings[name] for name in ("solver", "schedule", "num_steps")}
        labels = chosen_labels(None, count, model)
        drawn = draw_to(run.path / "parts", plan(model, **options), range(count), labels, key=run.digest)
        x, y, classes = drawn.x, drawn.y, model.num_classes
    num_classes = classes if settings["per_class"] else 0
    statistics = GaussianStatistics.fit(x, y, num_classes=num_classes, form=settings["form"], rank=settings["rank"])
    given = " ".join([typed_command(), *map(as_given, sys.argv[1:])])
    statistics = replace(statistics, provenance={"command": given, "images": len(x), "settings": settings})
    paths = [run.path / "statistics.safetensors", *([path] if settings["beside"] else [])]
    for path in paths:
        save_gaussian(statistics, path)
    run.finish(["statistics.safetensors"])
    spread = statistics.mean[:-1].std(dim=0).mean() if num_classes else torch.zeros(())
    print(f"statistics of {len(x)} images, {num_classes} classes whose means differ by {spread:.3f}: {paths[-1]}")


if __name__ == "__main__":
    main()
