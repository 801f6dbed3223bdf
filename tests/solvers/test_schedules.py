"""Schedules: their formulas, exact ends, and the search of GITS."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffdistill.models import GaussianMixture
from diffdistill.solvers import SCHEDULES, make_schedule, make_solver
from diffdistill.solvers.gits import METRICS, shortest_path
from diffdistill.solvers.schedules import ALIGN_YOUR_STEPS
from tests.solvers.test_named_schedules import TOOLS

ENDS = {"sigma_min": 0.03, "sigma_max": 14.0}


def vp_sigma(t: float) -> float:
    low, high = math.log(ENDS["sigma_min"] ** 2 + 1), math.log(ENDS["sigma_max"] ** 2 + 1)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    return math.sqrt(math.exp(beta_d * t * t / 2 + (high - beta_d / 2) * t) - 1)


FORMULAS = {
    "polynomial": ({"rho": 3.0}, lambda f: (14 ** (1 / 3) + f * (0.03 ** (1 / 3) - 14 ** (1 / 3))) ** 3),
    "logsnr": ({}, lambda f: 14.0 * (0.03 / 14.0) ** f),
    "time_uniform": ({"rho": 2.0}, lambda f: vp_sigma((1 + f * (1e-3**0.5 - 1)) ** 2)),
    "cosine": (
        {"scale": 0.5},
        lambda f: 0.5 * math.tan(math.atan(14 / 0.5) + f * (math.atan(0.03 / 0.5) - math.atan(14 / 0.5))),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_formula(name, num_steps):
    options, formula = FORMULAS[name]
    sigmas = make_schedule(name, num_steps=num_steps, **ENDS, **options)
    expected = torch.tensor([formula(i / num_steps) for i in range(num_steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(sigmas, expected, rtol=1e-10, atol=0)
    assert (sigmas[0].item(), sigmas[-1].item()) == (14.0, 0.03)


def test_integers_of_numpy_count():
    assert len(make_schedule("polynomial", num_steps=np.int64(3), **ENDS)) == 4
    assert make_solver("ipndm", order=np.int64(3)).memory == 2


def test_cosine_is_that_of_data_of_unit_variance_unless_told_otherwise():
    expected = [14.0, math.tan((math.atan(14) + math.atan(0.03)) / 2), 0.03]
    torch.testing.assert_close(make_schedule("cosine", num_steps=2, **ENDS), torch.tensor(expected).double())
    with pytest.raises(ValueError, match="scale must be positive, but is 0"):
        make_schedule("cosine", num_steps=2, scale=0.0, **ENDS)


def test_discrete_visits_the_entries_of_its_table():
    table = [0.1, 0.3, 0.5, 2.0, 9.0]
    sigmas = make_schedule("discrete", num_steps=4, sigma_min=0.1, sigma_max=9.0, table=table)
    torch.testing.assert_close(sigmas, torch.tensor(table[::-1], dtype=torch.float64))
    halves = make_schedule("discrete", num_steps=8, sigma_min=0.1, sigma_max=9.0, table=table)
    torch.testing.assert_close(halves[1], torch.tensor(math.sqrt(9.0 * 2.0), dtype=torch.float64))
    # With rho = 2 the places are 4, 1 and 0: uniform in their square root. Ends beyond the table are kept.
    curved = make_schedule("discrete", num_steps=2, sigma_min=0.01, sigma_max=9.0, table=table, rho=2.0)
    assert curved.tolist() == pytest.approx([9.0, 0.3, 0.01])


@pytest.mark.parametrize("model", ALIGN_YOUR_STEPS)
def test_align_your_steps(model):
    table = torch.tensor(ALIGN_YOUR_STEPS[model], dtype=torch.float64)
    assert torch.equal(make_schedule("align_your_steps", model=model), table)
    double = make_schedule("align_your_steps", model=model, num_steps=20)
    torch.testing.assert_close(double[::2], table)
    torch.testing.assert_close(double[1::2], (table[1:] * table[:-1]).sqrt())
    ends = make_schedule("align_your_steps", model=model, num_steps=5, sigma_min=0.001, sigma_max=900.0)
    assert (ends[0].item(), ends[-1].item()) == (900.0, 0.001)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 6])
def test_shortest_path_is_that_of_brute_force(num_steps):
    paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), num_steps - 1)]
    for seed in range(20):
        cost = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def total(path, cost=cost):
            return sum(1.15**k * cost[i, j].item() for k, (i, j) in enumerate(itertools.pairwise(path)))

        assert tuple(shortest_path(cost, num_steps, 1.15)) == min(paths, key=total)


@pytest.mark.parametrize("metric", METRICS)
def test_costs_of_gits_are_those_of_each_jump(metric):
    points, slopes = torch.randn(5, 3, 7).double().cumsum(0), torch.randn(4, 3, 7).double()
    sigmas = make_schedule([9.0, 4.0, 2.0, 0.5, 0.1])
    costs = METRICS[metric](points, slopes, sigmas - sigmas[:-1, None])

    def deviation(x):
        to_end, chord = points[-1] - x, points[-1] - points[0]
        along = (to_end * chord).sum(1) / chord.norm(dim=1)
        return (to_end.square().sum(1) - along**2).clamp(min=0).sqrt()

    for i, j in itertools.combinations(range(5), 2):
        jump = points[i] + (sigmas[j] - sigmas[i]) * slopes[i]
        expected = {
            "dev": deviation(jump) - deviation(points[j]),
            "l1": (jump - points[j]).abs().sum(1),
            "l2": (jump - points[j]).norm(dim=1),
        }
        torch.testing.assert_close(costs[i, j], expected[metric].mean())


@pytest.mark.parametrize("metric", ["dev", "l1", "l2"])
def test_gits_chooses_levels_of_the_fine_schedule(metric):
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 3, 5), [0.1, 0.2])
    noise = torch.randn(7, 2, 3, 5, dtype=torch.float64)
    options = {"denoiser": mixture, "noise": noise, "metric": metric, "fine_steps": 12, "rho": 5.0, **ENDS}
    fine = make_schedule("polynomial", num_steps=12, rho=5.0, **ENDS)
    assert torch.equal(make_schedule("gits", num_steps=12, **options), fine)
    sigmas = make_schedule("gits", num_steps=4, **options)
    assert len(sigmas) == 5 and set(sigmas.tolist()) <= set(fine.tolist())
    assert (sigmas[0].item(), sigmas[-1].item()) == (14.0, 0.03)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("linear", {}, ValueError, "polynomial"),
        ("logsnr", {"num_steps": 3, **ENDS, "rho": 7}, TypeError, "num_steps, sigma_min, sigma_max"),
        ("polynomial", {"num_steps": 0, **ENDS}, ValueError, "at least 1"),
        ("polynomial", {"num_steps": 2.5, **ENDS}, ValueError, "integer"),
        ("polynomial", {"num_steps": 6.0, **ENDS}, ValueError, "integer"),
        ("polynomial", {"num_steps": "6", **ENDS}, ValueError, "num_steps must be an integer, but is '6'"),
        ("polynomial", {"num_steps": 3, "sigma_min": 2.0, "sigma_max": 1.0}, ValueError, "sigma_min < sigma_max"),
        ("polynomial", {"num_steps": 3, "sigma_min": -1.0, "sigma_max": 1.0}, ValueError, "0 <= sigma_min"),
        ("polynomial", {"num_steps": 3, **ENDS, "rho": 0.0}, ValueError, "rho"),
        ("logsnr", {"num_steps": 3, "sigma_min": 0.0, "sigma_max": 1.0}, ValueError, "sigma_min > 0"),
        ("discrete", {"num_steps": 3, **ENDS, "table": [2.0, 1.0]}, ValueError, "increasing"),
        ("align_your_steps", {"model": "sd3"}, ValueError, "sd15, sdxl, deepfloyd, svd"),
        ([], {}, ValueError, "at least 2"),
        ([1.0], {}, ValueError, "at least 2"),
        ([1.0, 2.0], {}, ValueError, "strictly decrease"),
        ([1.0, 1.0], {}, ValueError, "strictly decrease"),
        ([1.0, float("nan")], {}, ValueError, "finite"),
        ([1.0, -1.0], {}, ValueError, "negative"),
        ([2.0, 1.0], {"num_steps": 1}, TypeError, "no options"),
    ],
)
def test_bad_input(name, options, error, message):
    with pytest.raises(error, match=message):
        make_schedule(name, **options)


def test_trailing_levels_nest_under_halving():
    table = torch.arange(1, 1001).double()
    assert make_schedule("trailing", num_steps=4, table=table).tolist() == [1000, 750, 500, 250, 0]
    for num_steps in (1, 2, 8, 64):
        longer = make_schedule("trailing", num_steps=2 * num_steps, table=table)
        assert torch.equal(longer[::2], make_schedule("trailing", num_steps=num_steps, table=table))
    with pytest.raises(ValueError, match="ends at 1000"):
        make_schedule("trailing", num_steps=4, table=table, sigma_max=80.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_uniform_in_shifted_time_and_nest(shift):
    for num_steps in (1, 2, 3, 8):
        sigmas = make_schedule("flow", num_steps=num_steps, shift=shift)
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        torch.testing.assert_close(sigmas / (1 + sigmas), shift * t / (1 + (shift - 1) * t), rtol=1e-7, atol=0)
        assert float((sigmas / (1 + sigmas))[0].float()) == 1.0
        longer = make_schedule("flow", num_steps=2 * num_steps, shift=shift)
        assert torch.equal(longer[::2], sigmas)
    assert make_schedule("flow", num_steps=4, sigma_max=999.0, shift=shift)[0] == 999
    for options, match in (
        ({"sigma_min": 0.1}, "ends at 0"),
        ({"shift": 0.0}, "shift"),
        ({"sigma_max": 1.0}, "decrease"),
    ):
        with pytest.raises(ValueError, match=match):
            make_schedule("flow", num_steps=4, **{"shift": 3.0, **options})


def test_every_schedule_is_tested():
    assert set(SCHEDULES) == {*FORMULAS, *TOOLS, "discrete", "align_your_steps", "gits", "trailing", "flow"}
