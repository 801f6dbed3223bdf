"""Comparing solvers: how many steps a number of evaluations makes, what is chosen, tables, and the scripts."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from diffdistill.models import GaussianMixture, save_denoiser
from diffdistill.solver_comparison import (
    Grid,
    Measurement,
    Problem,
    best,
    measure_candidate,
    num_steps_for,
    predictor_name,
    reference_endpoints,
)
from diffdistill.solver_comparison.report import as_csv, as_markdown, gains, plot
from diffdistill.solvers import GaussianStatistics, load_gaussian, make_schedule, make_solver
from tests.builders import tiny_denoiser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture
def problem(tmp_path):
    means = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixture = GaussianMixture([0.4, 0.3, 0.3], means, [0.1, 0.2, 0.1], labels=[0, 1, 1])
    labels = torch.arange(20) % 2
    options = {"solver": make_solver("unipc"), "num_steps": 100, "folder": tmp_path / "reference", "batch_size": 8}
    endpoints = reference_endpoints(mixture, range(20), labels, **options)
    return Problem(mixture, range(20), labels, endpoints, batch_size=8)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpm3", "dpmpp"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
def test_the_evaluations_are_those_asked_for(problem, name, afs, sigma_min):
    options = {"name": name, "afs": afs}
    grid = Grid({"polynomial": {"name": "polynomial", "sigma_min": sigma_min}})
    found = 0
    for evaluations in range(1, 8):
        for candidate in grid.candidates(name, options, evaluations, problem.part(2), started=False):
            row, _ = measure_candidate(candidate, problem.part(2))
            assert row.nfe == evaluations
            found += 1
    assert found >= 2
    assert num_steps_for(make_solver("heun"), 3, to_zero=False) is None


def test_a_base_has_its_own_schedule(problem):
    grid = Grid({name: {"name": "polynomial", "rho": rho} for name, rho in (("steep", 7), ("flat", 3))})
    options = {"solver": {"name": "euler", "afs": True}, "evaluations": 3, "problem": problem.part(2)}
    base = grid.base("base", schedule="flat", **options)
    row, _ = measure_candidate(base, problem.part(2))
    assert (row.solver, row.nfe, row.schedule) == ("base", 3, "flat")
    torch.testing.assert_close(
        base.sigmas, make_schedule("polynomial", rho=3, num_steps=4, sigma_min=0.002, sigma_max=80)
    )
    assert grid.base("base", schedule="flat", **{**options, "solver": {"name": "heun"}}) is None
    with pytest.raises(ValueError, match="unknown schedule 'round': choose one of flat, steep"):
        grid.base("base", schedule="round", **options)


def test_the_reference_is_kept(problem, tmp_path):
    files = sorted((tmp_path / "reference").iterdir())
    assert [path.name for path in files] == [f"0000{i}.safetensors" for i in range(3)]
    before = [path.stat().st_mtime_ns for path in files]
    again = reference_endpoints(
        Silent(problem.denoiser),
        range(20),
        problem.labels,
        solver=make_solver("unipc"),
        num_steps=100,
        folder=tmp_path / "reference",
        batch_size=8,
    )
    assert torch.equal(again, problem.endpoints)
    assert before == [path.stat().st_mtime_ns for path in files]


class Silent(torch.nn.Module):
    """A denoiser that must not be asked."""

    def __init__(self, like):
        super().__init__()
        self.data_shape, self.sigma_min, self.sigma_max = like.data_shape, like.sigma_min, like.sigma_max

    def forward(self, *args):
        raise AssertionError("asked again")


def test_the_best_is_chosen_and_measured(problem):
    statistics = GaussianStatistics.fit(problem.denoiser.sample_data(500), torch.arange(500) % 2, num_classes=2)
    schedules = {"good": {"name": "polynomial", "rho": 5}, "bad": {"name": "polynomial", "rho": 1}}
    grid, solver = Grid(schedules, statistics, (10.0, 5.0)), {"name": "dpmpp", "order": 2}
    plain = best(grid.candidates("dpmpp", solver, 5, problem, started=False), problem)
    started = best(grid.candidates("dpmpp", solver, 5, problem, started=True), problem)
    assert (plain.schedule, plain.start) == ("good", None)
    assert started.start.sigma in (10.0, 5.0)
    rows = [measure_candidate(candidate, problem, lambda x: float(len(x)))[0] for candidate in (plain, started)]
    assert rows[1].error < rows[0].error
    assert rows[0].frechet == 20
    exact = Grid({"fine": {"name": "polynomial"}}).candidates("unipc", {"name": "unipc"}, 100, problem, started=False)
    assert measure_candidate(exact[0], problem)[0].error < 1e-10
    assert best([], problem) is None


def test_tables(tmp_path):
    rows = [
        Measurement("a", 3, None, "x", 2.0, None, 0.5),
        Measurement("a", 3, 7.0, "x", 1.0, 0.25, 0.5),
        Measurement("learned", 3, None, "learned", 0.1, None, 0.5, parameters=9, training_seconds=60.0),
    ]
    table = as_markdown(rows)
    assert "| a | 3 |  | x | 2 |  | 0.5 | 0 |  |" in table
    assert "**0.1**" in table
    assert "**1**" not in table
    assert "| 3 | 2.000 | 1.000 | 0.500 |" in gains(rows)
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [row["error"] for row in read] == ["2.0", "1.0", "0.1"]
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_predictors_of_two_runs_have_the_names_of_their_runs(tmp_path, monkeypatch):

    monkeypatch.chdir(tmp_path)
    paths = ["runs/a/predictor.safetensors", "runs/b/predictor.safetensors", "predictor.safetensors"]
    assert [predictor_name(path) for path in paths] == ["a", "b", tmp_path.name]
    assert [predictor_name(name) for name in ("digits-steps-3nfe", "runs/mine-5nfe.safetensors")] == [
        "digits-steps-3nfe",
        "mine-5nfe",
    ]


def test_the_scripts(tmp_path, monkeypatch):
    """Statistics, comparison and trajectories of a tiny model with three channels."""
    import analyze_trajectories
    import compare_solvers
    import gaussian_stats
    from common.configs import compose

    model, statistics = tmp_path / "model.safetensors", tmp_path / "statistics" / "statistics.safetensors"
    save_denoiser(tiny_denoiser(data_shape=[3, 8, 8]), model)
    shared = [f"model={model}", "data=shapes", "data.resolution=8", "data.size=40", "device=cpu"]

    def call(script, *overrides):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shared, *overrides])
        script.main()

    call(gaussian_stats, f"out={statistics.parent}", "samples=30", "num_steps=2", "form=fourier", "beside=true")
    assert load_gaussian(statistics).data_shape == (3, 8, 8)

    config = compose("compare_solvers", [])
    kept = ("heun", "ipndm-3", "polynomial_3", "logsnr", "gits")
    left = [
        f"~{part}.{name}" for part in ("solvers", "schedules", "bases") for name in config[part] if name not in kept
    ]
    few = ["num_samples=6", "batch_size=4", "tuning_samples=3", "evaluations=[2,3]", "reference.num_steps=3"]
    call(compare_solvers, *left, *few, "start.sigmas=[9.0]", f"out={tmp_path / 'solvers'}")
    rows = list(csv.DictReader((tmp_path / "solvers" / "solvers.csv").read_text().splitlines()))
    expected = [(name, nfe) for nfe in ("2", "3") for name in ("heun", "ipndm-3")]  # heun: 3 with analytical first step
    assert [(r["solver"], r["nfe"], r["start"]) for r in rows] == [(*e, s) for e in expected for s in ("", "9.0")]

    given = ["num_trajectories=6", "num_steps=4", "mixture.components=5", "batch_size=4", f"out={tmp_path / 'shapes'}"]
    call(analyze_trajectories, *given)
    assert set(json.loads((tmp_path / "shapes" / "trajectories.json").read_text())) == {str(model), "mixture"}
