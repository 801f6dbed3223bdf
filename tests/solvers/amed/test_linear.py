"""The general linear form: its inner solver when neutral, its formula, and the solvers that it contains."""

import pytest
import torch

from diffdistill.models import GaussianMixture
from diffdistill.solvers import GaussianStart, GaussianStatistics, LearnedTable, make_schedule, make_solver, sample
from diffdistill.solvers.amed import LinearSteps, LinearTable

SHAPE = (2, 5, 7)
SIGMAS = make_schedule([20.0, 6.0, 1.5, 0.4, 0.05])
INNER = [
    ("euler", {}),
    ("ipndm", {"order": 3}),
    ("deis", {"order": 3}),
    ("dpmpp", {"order": 2}),
    ("unipc", {"order": 3}),
]


def mixture():
    torch.manual_seed(0)
    return GaussianMixture([0.7, 0.3], torch.randn(2, *SHAPE), [0.3, 0.1])


def table(num_intervals=4, **options):
    torch.manual_seed(1)
    made = LinearTable(num_intervals, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def noise():
    torch.manual_seed(2)
    return torch.randn(3, *SHAPE, dtype=torch.float64)


@pytest.mark.parametrize(("name", "options"), INNER)
@pytest.mark.parametrize("afs", [False, True])
def test_an_untrained_one_is_the_inner_solver(name, options, afs):
    inner = make_solver(name, afs=afs, **options)
    solver = LinearSteps(inner, LinearTable(4, scale_dir=0.5))
    run = sample(mixture(), noise(), solver=solver, sigmas=SIGMAS, return_trajectory=True)
    same = sample(mixture(), noise(), solver=inner, sigmas=SIGMAS, return_trajectory=True)
    assert run.nfe == same.nfe == 4 - afs
    torch.testing.assert_close(run.x, same.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lags", [1, 2, 4])
@pytest.mark.parametrize("sum_to_zero", [False, True])
def test_the_formula(lags, sum_to_zero):
    """`x_next = ratio x + (1 - ratio) (D_i + sum_j c_ij D_j)` around DDIM, with weights counted from the newest."""
    if lags == 1 and sum_to_zero:
        return
    predictor = table(lags=lags, sum_to_zero=sum_to_zero, scale_time=0.0)
    solver, model = LinearSteps(make_solver("euler"), predictor), mixture()
    run = sample(model, noise(), solver=solver, sigmas=SIGMAS, return_trajectory=True)
    x, answers = noise() * SIGMAS[0], []
    for i, (sigma, sigma_next) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
        answers.append(model(x, sigma.expand(3)))
        newest, ratio = answers[: -lags - 1 : -1], sigma_next / sigma
        c = 0.1 * predictor.weight[i].detach()
        c = c[: len(newest) - sum_to_zero]
        if sum_to_zero:
            c = torch.cat([-c.sum()[None], c])
            assert abs(c.sum()) < 1e-12
        added = sum(weight * answer for weight, answer in zip(c, newest, strict=True))
        x = ratio * x + (1 - ratio) * (answers[-1] + added)
        torch.testing.assert_close(run.x[i + 1], x, rtol=1e-10, atol=1e-10)


def test_it_contains_a_multistep_solver():
    """Weights on the step of Euler that make it DPM-Solver++(2M)."""
    predictor = LinearTable(4, lags=2, scale_time=0.0).double()
    levels = SIGMAS.log()
    with torch.no_grad():
        for i in range(1, 4):
            r = (levels[i] - levels[i - 1]) / (levels[i + 1] - levels[i])
            predictor.weight[i] = torch.stack([10 / (2 * r), -10 / (2 * r)])
    ours = sample(mixture(), noise(), solver=LinearSteps(make_solver("euler"), predictor), sigmas=SIGMAS)
    full = make_solver("dpmpp", order=2, lower_order_final=False)
    theirs = sample(mixture(), noise(), solver=full, sigmas=SIGMAS)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_past_answers_of_an_analytic_start_have_weights_too():
    model = mixture()
    statistics = GaussianStatistics.fit(model.sample_data(500, generator=torch.Generator().manual_seed(0)))
    start = GaussianStart(statistics, 20.0, sigma_max=80.0)
    options = {"sigmas": SIGMAS, "start": start}
    inner = make_solver("ipndm", order=3)
    ends = [
        sample(model, noise(), solver=solver, **options)
        for solver in (inner, LinearSteps(inner, LinearTable(4)), LinearSteps(inner, table(4)))
    ]
    assert (ends[2] - ends[1]).abs().max() > 0.1 and ends[2].isfinite().all()
    one = LinearTable(4).double()
    with torch.no_grad():
        one.weight[0, 3] = 1.0  # the oldest answer that there can be in the first step: only a start has given it
    moved = sample(model, noise(), solver=LinearSteps(inner, one), **options)
    assert (moved - ends[1]).abs().max() > 1e-3
    unmoved = sample(model, noise(), solver=LinearSteps(inner, one), sigmas=SIGMAS)
    torch.testing.assert_close(unmoved, sample(model, noise(), solver=inner, sigmas=SIGMAS))


def test_a_step_to_zero_and_what_is_refused():
    solver = LinearSteps(make_solver("ipndm", order=2), table())
    sigmas = make_schedule([*SIGMAS.tolist(), 0.0])
    run = sample(mixture(), noise(), solver=solver, sigmas=sigmas, return_trajectory=True)
    assert run.nfe == 5
    torch.testing.assert_close(run.x[-1], mixture()(run.x[-2], SIGMAS[-1].expand(3)))
    with pytest.raises(ValueError, match="for 4 intervals, but the schedule has 2"):
        sample(mixture(), noise(), solver=solver, sigmas=make_schedule([9.0, 1.0, 0.1]))
    with pytest.raises(TypeError, match="from a LinearTable, not from LearnedTable"):
        LinearSteps(make_solver("euler"), LearnedTable(4))
    with pytest.raises(TypeError, match="one-stage"):
        LinearSteps(make_solver("heun"), LinearTable(4))
