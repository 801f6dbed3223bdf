"""Schedules of other tools, against their formulas written out with plain numbers."""

import math

import numpy as np
import pytest
import torch

from diffdistill.solvers import make_schedule
from diffdistill.solvers.discrete_time import scaled_linear_table

TABLE = scaled_linear_table().numpy()
LOW, HIGH = float(TABLE[0]), float(TABLE[-1])


def index_of(sigma):
    return int(np.abs(np.log(TABLE) - math.log(sigma)).argmin())


def at(place):
    return float(np.exp(np.interp(place, np.arange(len(TABLE)), np.log(TABLE))))


def karras(n):
    ramp = np.linspace(0, 1, n)
    return ((HIGH ** (1 / 7) + ramp * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7).tolist()


def exponential(n):
    return np.exp(np.linspace(math.log(HIGH), math.log(LOW), n)).tolist()


def kl_optimal(n):
    return [math.tan(i / max(n - 1, 1) * math.atan(LOW) + (1 - i / max(n - 1, 1)) * math.atan(HIGH)) for i in range(n)]


def sgm_uniform(n):
    return [at(t) for t in np.linspace(index_of(HIGH), index_of(LOW), n + 1)[:-1]]


def simple(n):
    return [TABLE[-(1 + int(x * (len(TABLE) / n)))] for x in range(n)]


def ddim_uniform(n):
    visited, place = [], 1
    while place < len(TABLE):
        visited.append(TABLE[place])
        place += max(len(TABLE) // n, 1)
    return visited[::-1]


def beta(n):
    stats = pytest.importorskip("scipy.stats")
    return [LOW + stats.beta.ppf(1 - share, 0.6, 0.6) * (HIGH - LOW) for share in np.linspace(0, 1, n)]


ENDS = {"sigma_min": LOW, "sigma_max": HIGH}
TOOLS = {
    "karras": (karras, ENDS),
    "exponential": (exponential, ENDS),
    "kl_optimal": (kl_optimal, ENDS),
    "beta": (beta, ENDS),
    "sgm_uniform": (sgm_uniform, {}),
    "simple": (simple, {}),
    "ddim_uniform": (ddim_uniform, ENDS),
}


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 40])
def test_levels_are_those_of_the_tool(name, num_steps):
    formula, options = TOOLS[name]
    sigmas = make_schedule(name, num_steps=num_steps, **options)
    expected = torch.tensor([*formula(num_steps), 0.0], dtype=torch.float64)
    torch.testing.assert_close(sigmas, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas")],
)
def test_levels_are_those_of_diffusers(name, setting):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stock = diffusers.EulerDiscreteScheduler(**betas, **{setting: True})
    stock.set_timesteps(8)
    levels = (1 / stock.alphas_cumprod.double() - 1).sqrt()
    sigmas = make_schedule(name, num_steps=8, sigma_min=float(levels[0]), sigma_max=float(levels[-1]))
    torch.testing.assert_close(sigmas.float(), stock.sigmas, rtol=1e-6, atol=0)


def test_beta_of_a_table():
    stats = pytest.importorskip("scipy.stats")
    places = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, 9, endpoint=False), 0.6, 0.6) * 999)
    expected = torch.tensor([*(TABLE[int(place)] for place in places), 0.0], dtype=torch.float64)
    torch.testing.assert_close(make_schedule("beta", num_steps=9, table=TABLE), expected)


def test_what_is_refused():
    with pytest.raises(ValueError, match="makes 31 steps in place of 30 of a table of 1000"):
        make_schedule("ddim_uniform", num_steps=30)
    with pytest.raises(ValueError, match=r"ends of its table, .* but sigma_max is 80"):
        make_schedule("simple", num_steps=3, sigma_max=80.0)
    with pytest.raises(ValueError, match="visit levels of a table of 3 twice"):
        make_schedule("simple", num_steps=4, table=[0.1, 1.0, 3.0])
    with pytest.raises(ValueError, match="sigma_min is the level before it"):
        make_schedule("karras", num_steps=4, sigma_min=0.0, sigma_max=80.0)
    with pytest.raises(ValueError, match="needs sigma_min and sigma_max"):
        make_schedule("beta", num_steps=4)
