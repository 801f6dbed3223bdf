"""Show how few dimensions sampling trajectories lie in, for a model and for a mixture of Gaussians with its data.

    diffdistill analyze-trajectories model=digits-teacher out=runs/trajectories

Writes `out/trajectories.png` and `out/trajectories.json`. The mixture has one narrow component on each of a few images
of the data, so that its trajectories carry no error of a network.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.denoiser import Denoiser, spread_labels
from diffdistill.devices import device_of
from diffdistill.files.atomic import write_text
from diffdistill.models import GaussianMixture, guided
from diffdistill.solver_comparison.trajectories import TrajectoryShape, analyze, plot_shapes
from diffdistill.solvers import Trajectory, make_schedule, make_solver, sample, seeded_noise
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of


def shape_of(denoiser: Denoiser, settings: dict[str, Any], device: torch.device) -> TrajectoryShape:
    count, size = settings["num_trajectories"], settings["batch_size"]
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    sigmas = make_schedule(**{**ends, **settings["schedule"]}, num_steps=settings["num_steps"])
    labels, solver, points = spread_labels(count, denoiser.num_classes), make_solver(**settings["solver"]), []
    for first in range(0, count, size):
        seeds = range(count)[first : first + size]
        noise = seeded_noise(seeds, denoiser.data_shape, device=device)
        cond = None if labels is None else labels[first : first + size].to(device)
        run = sample(denoiser, noise, solver=solver, sigmas=sigmas, cond=cond, return_trajectory=True)
        points.append(run.x.cpu())
    return analyze(Trajectory(torch.cat(points, dim=1), sigmas, 0), components=settings["components"])


@command("analyze_trajectories")
def main(config: DictConfig) -> None:
    settings = plain(config)
    narrow = settings["mixture"]
    if not narrow["components"] >= 1 or not narrow["std"] > 0:
        raise ValueError(f"mixture takes at least one component and a positive std, not {narrow}")
    run = Run(settings["out"], settings, inputs=inputs_of(settings), harmless=("device", "out"))
    device = device_of(settings["device"])
    model = load_denoiser(settings["model"], device=device)
    images = load_data(**settings["data"]).tensors()["x"][: settings["mixture"]["components"]]
    variances = torch.full((len(images),), settings["mixture"]["std"] ** 2)
    mixture = GaussianMixture(torch.ones(len(images)), images, variances).to(device)
    shapes = [
        (settings["model"], shape_of(guided(model, settings["w"]) if settings["w"] else model, settings, device)),
        ("mixture", shape_of(mixture, settings, device)),
    ]
    numbers = {name: shape.numbers() for name, shape in shapes}
    write_text(run.path / "trajectories.json", json.dumps(numbers, indent=2) + "\n")
    plot_shapes(shapes, run.path / "trajectories.png")
    run.finish(["trajectories.json", "trajectories.png"])
    for name, values in numbers.items():
        shares = ", ".join(f"{100 * share:.3f}" for share in values["explained_mean"])
        print(f"{name}: the first components explain {shares} % of the variance of a trajectory")


if __name__ == "__main__":
    main()
