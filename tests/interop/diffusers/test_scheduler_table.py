"""Every stock pipeline that can be built tiny, times solvers: no pipeline tells ours from its own scheduler."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill.interop.diffusers import SolverScheduler, scheduler_for
from diffdistill.interop.diffusers.flow_scheduler import FlowSolverScheduler
from diffdistill.solvers import AMEDPlugin, LearnedTable, make_solver
from tests.interop.diffusers.builders import diffusers
from tests.interop.diffusers.stock import close
from tests.interop.diffusers.zoo import PIPELINES

STAGES = {"ddim": 1, "dpmpp": 1, "heun": 2, "dpm3": 3, "learned": 2}


def learned(num_intervals):
    predictor = LearnedTable(num_intervals)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(std=0.3)
    return AMEDPlugin(make_solver("dpm2"), predictor)


def scheduler(case, name, solver, num_steps):
    return scheduler_for(case.pipe(name), solver=learned(num_steps) if solver == "learned" else solver)


def counterpart(own):
    """The stock scheduler of first order with the same settings."""
    settings = {setting: value for setting, value in own.config.items() if not setting.startswith("_")}
    if "variance_type" in settings:
        settings["variance_type"] = None  # which DDIM does not know to leave out
    if "shift" in settings:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings)
    if type(own).__name__.startswith("Euler"):
        return diffusers.EulerDiscreteScheduler.from_config(settings)
    return diffusers.DDIMScheduler.from_config({"clip_sample": False, **settings})


@pytest.mark.parametrize("name", PIPELINES)
def test_ddim_is_the_stock_scheduler(name):
    case = PIPELINES[name]
    stock, asked = case.run(case.pipe(name, counterpart(case.scheduler())))
    pipe = case.pipe(name)
    pipe.scheduler = scheduler(case, name, "ddim", 4)
    ours, count = case.run(pipe)
    close(ours, stock)
    assert count == asked


def refused(case, solver):
    return not case.whole and STAGES[solver] > 1


def pairs():
    """All pairs; of each pipeline two solvers run among the fast tests."""
    for i, name in enumerate(PIPELINES):
        fast = {"ddim", ["dpmpp", "heun", "learned", "dpm3"][i % 4]}
        for solver in STAGES:
            yield pytest.param(name, solver, marks=[] if solver in fast else pytest.mark.slow, id=f"{name}-{solver}")


@pytest.mark.parametrize(("name", "solver"), pairs())
def test_runs_can_be_repeated_and_copied(name, solver, tmp_path):
    case = PIPELINES[name]
    if refused(case, solver):
        with pytest.raises(ValueError, match="counts timesteps as steps"):
            scheduler(case, name, solver, 3)
        return
    pipe = case.pipe(name)
    pipe.scheduler = made = scheduler(case, name, solver, 4)
    first, _ = case.run(pipe)
    assert torch.isfinite(first).all()
    copies = [copy.deepcopy(made)]
    if solver != "learned":  # which is not saved, and has one number of steps
        made.save_pretrained(tmp_path)
        copies.append(type(made).from_pretrained(tmp_path))
        case.run(pipe, num_inference_steps=5)
    for scheduler_again in [made, *copies]:
        pipe.scheduler = scheduler_again
        assert torch.equal(case.run(pipe)[0], first)
    assert not torch.equal(case.run(pipe, seed=1)[0], first)


@pytest.mark.parametrize(
    ("name", "solver"),
    [p for p in pairs() if PIPELINES[p.values[0]].starts and not refused(PIPELINES[p.values[0]], p.values[1])],
)
def test_image_to_image_begins_at_the_step_of_its_strength(name, solver):
    case = PIPELINES[name]
    pipe = case.pipe(name, counterpart(case.scheduler()))
    made = scheduler(case, name, solver, 10)
    for strength, steps in ((0.1, 1), (0.5, 5), (1.0, 10)):
        options = {"num_inference_steps": 10, "strength": strength}
        pipe.scheduler = made
        images, count = case.run(pipe, **options)
        least = STAGES[solver] * (steps - 1) + 1  # of which the last ends at 0
        assert least <= count < least + STAGES[solver]
        if solver == "ddim":
            pipe.scheduler = counterpart(case.scheduler())
            stock = case.run(pipe, **options)[0]
            # From levels of thousands, where float32 leaves both schedulers four digits.
            bound = 1e-4 if "IF" in name else 1e-5
            torch.testing.assert_close(images, stock, rtol=bound, atol=bound * float(stock.abs().max()))


@pytest.mark.parametrize(
    ("name", "solver"), [p for p in pairs() if PIPELINES[p.values[0]].custom and p.values[1] != "learned"]
)
def test_levels_of_the_call(name, solver):
    case = PIPELINES[name]
    pipe = case.pipe(name)
    pipe.scheduler = made = scheduler(case, name, "ddim", 4)
    case.run(pipe)
    flow = isinstance(made, FlowSolverScheduler)
    levels = {
        "timesteps": made.timesteps.tolist(),
        "sigmas": made.sigmas[:-1].tolist() if flow else made.sigmas.tolist(),
    }
    expected, _ = case.run(pipe)
    pipe.scheduler = scheduler(case, name, solver, 4)
    several = [case.run(pipe, **{kind: levels[kind]})[0] for kind in case.custom]
    assert pipe.scheduler.num_inference_steps == 4
    for image in several:
        assert torch.isfinite(image).all()
        close(image, several[0])
        if solver == "ddim" and not flow:  # whose shift is made once more
            close(image, expected)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "DDPMPipeline"])
def test_whole_pipelines_are_saved(name, tmp_path):
    case = PIPELINES[name]
    pipe = case.pipe(name)
    pipe.scheduler = scheduler(case, name, "heun", 4)
    expected, _ = case.run(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    close(case.run(again)[0], expected)
    assert isinstance(again.scheduler, SolverScheduler)


def test_copies_of_whole_pipelines():
    case = PIPELINES["StableDiffusionPipeline"]
    pipe = case.pipe("StableDiffusionPipeline")
    pipe.scheduler = scheduler(case, "StableDiffusionPipeline", "heun", 4)
    expected, _ = case.run(pipe)
    close(case.run(copy.deepcopy(pipe))[0], expected)
