"""Compare solvers on one denoiser: distance to a fine reference against network evaluations, with and without start.

    python scripts/compare_solvers.py model=digits-teacher num_samples=5000 out=runs/solvers

For every number of evaluations each solver tries its schedules, and the levels to start at, on a few seeds; the best is
measured on all. Learned solvers join through `learned=[FILE,...]`. Running the same command again continues the run.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from common import command, plain
from diffdistill import load_denoiser
from diffdistill.atomic import write_text
from diffdistill.data import load_data
from diffdistill.devices import device_of
from diffdistill.evaluation import solver_comparison as comparison
from diffdistill.evaluation.features import gaussian_of, make_features
from diffdistill.evaluation.frechet import frechet_distance
from diffdistill.evaluation.solver_comparison import Candidate, Grid, Problem, Row
from diffdistill.generation import spread_labels
from diffdistill.learned import load_predictor
from diffdistill.models import guided
from diffdistill.solvers import load_gaussian, make_solver
from diffdistill.training import Run


def problem_of(settings: dict[str, Any], run: Run) -> Problem:
    denoiser = load_denoiser(settings["model"], device=device_of(settings["device"]))
    if settings["w"]:
        denoiser = guided(denoiser, settings["w"])
    seeds = range(settings["seed"], settings["seed"] + settings["num_samples"])
    labels, size = spread_labels(len(seeds), denoiser.num_classes), settings["batch_size"]
    fine = settings["reference"]
    endpoints = comparison.reference_endpoints(
        denoiser,
        seeds,
        labels,
        solver=make_solver(**fine["solver"]),
        num_steps=fine["num_steps"],
        folder=run.path / "reference",
        batch_size=size,
    )
    return Problem(denoiser, seeds, labels, endpoints, size)


def candidates(settings: dict[str, Any], problem: Problem) -> list[Candidate]:
    """The best use of every solver at every number of evaluations, then the learned solvers."""
    start = settings["start"]
    statistics = load_gaussian(start["statistics"] or settings["model"]) if start["sigmas"] else None
    grid = Grid(settings["schedules"], statistics, start["sigmas"])
    few = problem.part(settings["tuning_samples"])
    chosen = []
    with tqdm(total=len(settings["solvers"]) * len(settings["evaluations"]), desc="choosing", disable=None) as bar:
        for label, options in settings["solvers"].items():
            for evaluations in settings["evaluations"]:
                for started in (False, True) if start["sigmas"] else (False,):
                    tried = grid.candidates(label, make_solver(**options), evaluations, few, started=started)
                    chosen.append(comparison.best(tried, few))
                bar.update()
    for path in settings["learned"]:
        learned = load_predictor(path)
        learned.check(problem.denoiser)
        chosen.append(
            Candidate(
                f"{learned.form} {learned.inner.get('name', '')}".strip(),
                learned.solver,
                learned.sigmas,
                schedule="learned",
                parameters=sum(p.numel() for p in learned.solver.predictor.parameters()),
                training_seconds=learned.provenance.get("metrics", {}).get("seconds"),
            )
        )
    return [candidate for candidate in chosen if candidate is not None]


@command("compare_solvers")
def main(config: DictConfig) -> None:
    settings = plain(config)
    run = Run(settings["out"], settings, harmless=("device",))
    problem = problem_of(settings, run)
    features = make_features(settings["features"])
    real = gaussian_of(features, load_data(**settings["data"]).tensors()["x"])

    def frechet(x: torch.Tensor) -> float:
        return frechet_distance(gaussian_of(features, x.clamp(-1, 1)), real)

    rows: list[Row] = []
    for candidate in tqdm(candidates(settings, problem), desc="measuring", disable=None):
        row, _ = comparison.measure(candidate, problem, frechet)
        rows.append(row)
    rows.sort(key=lambda row: (row.nfe, row.solver, row.start is not None))
    write_text(run.path / "solvers.csv", comparison.comma_separated(rows))
    write_text(run.path / "solvers.md", comparison.markdown(rows) + "\n" + comparison.gains(rows))
    comparison.plot(rows, run.path / "solvers.png")
    run.finish(["solvers.csv", "solvers.md", "solvers.png"])
    print((run.path / "solvers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
