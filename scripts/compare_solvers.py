"""Compare solvers on one denoiser: distance to a fine reference against network evaluations, with and without start.

    diffdistill compare-solvers model=digits-teacher num_samples=5000 out=runs/solvers

For every number of evaluations each solver tries its schedules, an analytical first step, and the levels to start at,
on a few seeds; the best is measured on all. Learned solvers join through `learned=[NAME,...]`. Running the same command
again continues the run.
"""

from __future__ import annotations

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
from diffdistill.learned import load_predictor
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.features import gaussian_of
from diffdistill.metrics.frechet import frechet_distance
from diffdistill.models import guided
from diffdistill.sampling.plans import sampling_inputs, start_for, statistics_of
from diffdistill.solver_comparison import Grid, Problem, compare, entries, predictor_name, reference_endpoints
from diffdistill.solver_comparison.report import as_csv, as_markdown, gains, plot
from diffdistill.solvers import load_gaussian, make_solver
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of


def problem_of(settings: dict[str, Any], model: Denoiser, run: Run) -> Problem:
    """The seeds, and where their exact trajectories end."""
    denoiser = guided(model, settings["w"]) if settings["w"] else model
    seeds = range(settings["seed"], settings["seed"] + settings["num_samples"])
    labels, size = spread_labels(len(seeds), denoiser.num_classes), settings["batch_size"]
    fine = settings["reference"]
    same = {name: settings[name] for name in ("model", "w", "seed", "batch_size")}
    truth = Run(
        fine["out"] or run.path / "reference",
        {**same, "reference": fine},
        inputs=inputs_of(same),
        harmless=("out",),
        accept_changes=run.accept_changes,
    )
    endpoints = reference_endpoints(
        denoiser,
        seeds,
        labels,
        solver=make_solver(**fine["solver"]),
        num_steps=fine["num_steps"],
        folder=truth.path / "endpoints" / truth.digest,
        batch_size=size,
    )
    return Problem(denoiser, seeds, labels, endpoints, size)


@command("compare_solvers")
def main(config: DictConfig) -> None:
    settings = plain(config)
    if not settings["evaluations"] or not (settings["solvers"] or settings["learned"]):
        raise ValueError("nothing to compare: evaluations and solvers (or learned) name at least one each")
    for name in settings["learned"]:  # a wrong name is better known before an hour of work than after it
        load_predictor(name)
    titles = [predictor_name(name) for name in settings["learned"]]
    if len(set(titles)) < len(titles):
        raise ValueError(f"learned solvers need names of their own, but are called {', '.join(titles)}")
    for options in [*settings["solvers"].values(), *(base["solver"] for base in settings["bases"].values())]:
        make_solver(**options)
    features = make_features(settings["features"])
    model, data = load_denoiser(settings["model"], device=device_of(settings["device"])), load_data(**settings["data"])
    if tuple(data.shape) != tuple(model.data_shape):
        raise ValueError(f"the data has images {list(data.shape)}, but the model makes {list(model.data_shape)}")
    for sigma in settings["start"]["sigmas"]:
        start_for(model, {"sigma": sigma, "statistics": settings["start"]["statistics"]})
    real = gaussian_of(features, data.tensors()["x"])
    # Learned solvers may join later: what their files hold is in the names of their rows.
    given = {name: files for name, files in sampling_inputs(settings).items() if name != "learned"}
    run = Run(settings["out"], settings, inputs=given, harmless=("device", "learned", "out"))
    problem = problem_of(settings, model, run)

    def frechet(x: torch.Tensor) -> float:
        return frechet_distance(gaussian_of(features, x.clamp(-1, 1)), real)

    start = settings["start"]
    statistics = load_gaussian(start["statistics"] or statistics_of(settings["model"])) if start["sigmas"] else None
    grid = Grid(settings["schedules"], statistics, start["sigmas"], settings["analytic_first_step"])
    names = (settings[name] for name in ("solvers", "bases", "evaluations", "learned"))
    candidates = entries(grid, *names, problem, tuning_samples=settings["tuning_samples"])
    rows = compare(candidates, problem, run.path / "rows" / run.digest, frechet)
    write_text(run.path / "solvers.csv", as_csv(rows))
    write_text(run.path / "solvers.md", as_markdown(rows) + "\n" + gains(rows))
    plot(rows, run.path / "solvers.png")
    run.finish(["solvers.csv", "solvers.md", "solvers.png"])
    print((run.path / "solvers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
