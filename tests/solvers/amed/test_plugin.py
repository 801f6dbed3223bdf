"""The plugin: parity with the published one, the neutral case, gradients, and what it refuses."""

import pytest
import torch

from diffdistill.learned.schedule import halved
from diffdistill.solvers import (
    AMEDPlugin,
    AMEDPredictor,
    Correction,
    LearnedTable,
    ProbabilityFlow,
    TabulatedPredictor,
    intervals,
    make_schedule,
    make_solver,
    sample,
)
from diffdistill.solvers.amed import LearnedSteps
from tests.builders import tiny_denoiser
from tests.solvers.reference import Case, arrays, cases, mixture

SHAPE = (2, 8, 8)
PLUGIN = cases(plugin=True)
INNER = [
    ("euler", {}),
    ("dpm2", {}),
    ("ipndm", {}),
    ("ipndm_v", {}),
    ("deis", {"mode": "tab"}),
    ("deis", {"mode": "rhoab"}),
    ("dpmpp", {}),
    ("dpmpp", {"prediction": "eps"}),
    ("unipc", {}),
]
ids = [name + "".join(f"-{v}" for v in options.values()) for name, options in INNER]


def flow():
    return ProbabilityFlow(mixture())


@pytest.mark.parametrize("case", PLUGIN, ids=str)
def test_end_point_and_nfe(case: Case):
    steps = case.settings["num_steps"]
    data = arrays()
    predictor = TabulatedPredictor(
        data["amed_r"][:steps], scale_dir=data["amed_scale_dir"][:steps], scale_time=data["amed_scale_time"][:steps]
    )
    if case.settings["solver"] == "amed":
        solver = make_solver("amed", predictor=predictor, afs=case.settings["afs"])
    else:
        solver = AMEDPlugin(case.solver(), predictor)
    run = sample(
        mixture(),
        data["noise"],
        solver=solver,
        sigmas=case.sigmas(),
        thresholding=case.settings.get("thresholding"),
        return_trajectory=True,
    )
    assert run.nfe == case.settings["nfe"] == 2 * steps - case.settings["afs"]
    assert len(run.x) == steps + 1
    difference = (run.x[-1] - case.end).flatten(1).norm(dim=1) / case.end.flatten(1).norm(dim=1)
    assert difference.max().item() < 1e-8


@pytest.mark.parametrize(("name", "options"), INNER, ids=ids)
@pytest.mark.parametrize("afs", [False, True])
def test_a_neutral_plugin_is_the_inner_solver_on_the_refined_log_grid(name, options, afs):
    sigmas = make_schedule("polynomial", num_steps=3, sigma_min=0.01, sigma_max=20.0)
    inner = make_solver(name, afs=afs, **options)
    plugin = AMEDPlugin(inner, TabulatedPredictor([0.5] * 3))
    noise = arrays()["noise"]
    run = sample(mixture(), noise, solver=plugin, sigmas=sigmas, return_trajectory=True)
    if inner.stages == 2:
        same = sample(mixture(), noise, solver=inner, sigmas=sigmas, return_trajectory=True)
        torch.testing.assert_close(run.x, same.x, rtol=1e-10, atol=1e-12)
    else:
        refined = torch.stack([sigmas[:-1], (sigmas[:-1] * sigmas[1:]).sqrt()], 1).flatten()
        same = sample(mixture(), noise, solver=inner, sigmas=torch.cat([refined, sigmas[-1:]]), return_trajectory=True)
        torch.testing.assert_close(run.x, same.x[::2], rtol=1e-10, atol=1e-12)
    assert run.nfe == same.nfe == 6 - afs


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("build", [AMEDPredictor, lambda **options: LearnedTable(3, **options)])
def test_an_untrained_plugin_is_its_solver_on_the_refined_schedule(build, afs):
    schedule = {"name": "time_uniform", "rho": 2.0, "sigma_min": 0.01, "sigma_max": 20.0}
    sigmas, places = halved(schedule, 3)
    inner, noise = make_solver("deis", order=3, afs=afs), torch.randn(3, *SHAPE, dtype=torch.float64)
    denoiser = tiny_denoiser().double()
    plugin = AMEDPlugin(inner, build(scale_dir=0.2, scale_first=0.1, initial_r=places).double())
    cond = torch.tensor([0, 2, 1])
    run = sample(denoiser, noise, solver=plugin, sigmas=sigmas, cond=cond, return_trajectory=True)
    fine = make_schedule(**schedule, num_steps=6)
    same = sample(denoiser, noise, solver=inner, sigmas=fine, cond=cond, return_trajectory=True)
    torch.testing.assert_close(run.x, same.x[::2], rtol=1e-6, atol=1e-6)
    assert run.nfe == same.nfe == 6 - afs
    assert max(abs(r - 0.5) for r in places) > 0.01


@pytest.mark.parametrize(("name", "options"), [*INNER, ("amed", None)], ids=[*ids, "amed"])
def test_gradients_of_two_steps_with_respect_to_the_numbers(name, options):
    noise, sigmas = arrays()["noise"][:2], make_schedule([8.0, 1.5, 0.3])
    numbers = 0.6 + 0.3 * torch.rand(4, 2, 2, dtype=torch.float64)

    def run(r, scale_dir, scale_time, scale_first):
        def predictor(features, sigma, sigma_next):
            row = 0 if sigma[0] == 8 else 1
            return Correction(r[row], scale_dir[row], scale_time[row], scale_first[row])

        solver = (
            make_solver("amed", predictor=predictor)
            if options is None
            else AMEDPlugin(make_solver(name, **options), predictor)
        )
        x, history = noise * 8, ()
        for interval in intervals(sigmas, 2):
            x, history = solver.step(flow(), x, interval, history)
        return x

    inputs = tuple(n.clone().requires_grad_() for n in numbers)
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    gradients = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    assert all((g.abs() > 1e-8).all() for g in gradients), "a number has no effect"


def test_corrections_per_sample_equal_a_loop_over_samples():
    noise, sigmas = arrays()["noise"], make_schedule([20.0, 3.0, 0.4, 0.01])
    r, scale = 0.2 + 0.6 * torch.rand(3, 4), 0.9 + 0.2 * torch.rand(3, 4)

    def run(rows):
        predictor = TabulatedPredictor(r[:, rows], scale_dir=scale[:, rows], scale_time=scale[:, rows])
        return sample(mixture(), noise[rows], solver=AMEDPlugin(make_solver("dpmpp"), predictor), sigmas=sigmas)

    together = run(torch.arange(4))
    alone = torch.cat([run(torch.tensor([i])) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_a_schedule_to_zero_and_denoise_to_zero_cost_one_evaluation_more():
    predictor = TabulatedPredictor([0.4, 0.6])
    solver = AMEDPlugin(make_solver("ipndm"), predictor)
    noise = arrays()["noise"]
    asked = sample(
        mixture(),
        noise,
        solver=solver,
        sigmas=make_schedule([9.0, 1.0, 0.1]),
        denoise_to_zero=True,
        return_trajectory=True,
    )
    own = sample(mixture(), noise, solver=solver, sigmas=make_schedule([9.0, 1.0, 0.1, 0.0]), return_trajectory=True)
    assert asked.nfe == own.nfe == 5
    torch.testing.assert_close(asked.x, own.x)


def test_learned_steps_that_are_neutral_are_the_inner_solver():
    noise, sigmas = arrays()["noise"], make_schedule([20.0, 3.0, 0.4, 0.01])
    inner = make_solver("dpmpp", order=2)
    solver = LearnedSteps(inner, LearnedTable(3, scale_dir=0.5, scale_time=0.2))
    run = sample(mixture(), noise, solver=solver, sigmas=sigmas, return_trajectory=True)
    assert run.nfe == 3
    torch.testing.assert_close(run.x[-1], sample(mixture(), noise, solver=inner, sigmas=sigmas), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        solver.predictor.logit_scale_time[1] = 1.0
    moved = sample(mixture(), noise, solver=solver, sigmas=sigmas, return_trajectory=True)
    assert torch.equal(moved.x[1], run.x[1]) and not torch.equal(moved.x[2], run.x[2])


@pytest.mark.parametrize("name", ["heun", "dpm3", "edm_sde", "euler_ancestral"])
def test_solvers_without_a_free_place_are_refused_at_construction(name):
    with pytest.raises(TypeError, match="cannot wrap"):
        AMEDPlugin(make_solver(name), TabulatedPredictor([0.5]))


def test_a_plugin_in_a_plugin_is_refused():
    plugin = AMEDPlugin(make_solver("euler"), TabulatedPredictor([0.5]))
    with pytest.raises(TypeError, match="AMEDPlugin"):
        AMEDPlugin(plugin, TabulatedPredictor([0.5]))
    steps = LearnedSteps(make_solver("euler"), LearnedTable(1))
    with pytest.raises(TypeError, match="cannot wrap LearnedSteps"):
        AMEDPlugin(steps, TabulatedPredictor([0.5]))
    for inner in (steps, plugin, make_solver("dpm2")):
        with pytest.raises(TypeError, match="cannot wrap"):
            LearnedSteps(inner, LearnedTable(1))


def test_what_is_no_solver_or_no_predictor_is_refused():
    with pytest.raises(TypeError, match="cannot wrap str"):
        AMEDPlugin(inner_solver="euler", predictor=TabulatedPredictor([0.5]))
    with pytest.raises(TypeError, match="a function, but is 3"):
        make_solver("amed", predictor=3)
