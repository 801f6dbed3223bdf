"""Our solvers as schedulers of the stock pipelines of flow matching, of DiT and of DDPM equal our own sampler."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import sample
from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_pipeline
from diffdistill.interop.diffusers.scheduler import FlowSolverScheduler, scheduler_for, student_scheduler
from diffdistill.learned.storage import make_learned
from diffdistill.models import guided
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import (
    AMEDPlugin,
    ProbabilityFlow,
    TabulatedPredictor,
    integrate,
    intervals,
    make_schedule,
    make_solver,
)
from tests.interop.diffusers.builders import diffusers, dit, flux_pipeline, sd3_pipeline, unet_2d, vae
from tests.interop.diffusers.stock import PROMPTS, close

STOCK = diffusers.FlowMatchEulerDiscreteScheduler
W = 2.0


class Case:
    """A pipeline, how it is called for latents, and our denoiser of the same."""

    def __init__(self, name):
        self.flux = name == "FLUX"
        self.pipe = flux_pipeline() if self.flux else sd3_pipeline()
        self.parts = from_pipeline(self.pipe, w_range=(0.0, 6.0) if self.flux else None)
        shape = (2, 4, 4, 6) if self.flux else (2, 4, 8, 8)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        self.denoiser, self.cond = guided(self.parts.denoiser, W), self.parts.prompts(PROMPTS)

    def stock(self, scheduler, num_steps, **options):
        self.pipe.scheduler = scheduler
        size = {"height": 8, "width": 12} if self.flux else {}
        return self.pipe(
            PROMPTS,
            latents=self.packed(self.noise),
            num_inference_steps=num_steps,
            guidance_scale=W + 1,
            output_type="latent",
            **size,
            **options,
        ).images

    def packed(self, latents):
        return diffusers.FluxPipeline._pack_latents(latents, *latents.shape) if self.flux else latents.clone()

    def start(self, sigmas):
        return as_in_stock_pipelines(self.noise, float(sigmas[0]), flow=True)


@pytest.fixture(scope="module", params=["SD3", "FLUX"])
def case(request):
    return Case(request.param)


SOLVERS = {
    "euler": {"name": "euler"},
    "heun": {"name": "heun"},
    "dpm3": {"name": "dpm3"},
    "ipndm": {"name": "ipndm", "order": 3},
    "dpmpp": {"name": "dpmpp", "order": 2},
    "unipc": {"name": "unipc", "order": 3},
}


SCHEDULES = {
    "the pipeline's": None,
    "polynomial": {"name": "polynomial", "rho": 3.0, "sigma_max": 20.0},
    "flow": {"name": "flow", "shift": 2.0, "sigma_max": 20.0},
}
STAGED = {"heun", "dpm3"}
"""From noise alone these begin with Euler's method in a pipeline."""


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(n, s) for n in SOLVERS for s in SCHEDULES if n not in STAGED or SCHEDULES[s] is not None],
)
def test_any_solver_runs_in_a_flow_pipeline(name, schedule, case):
    made = scheduler_for(case.pipe, solver=SOLVERS[name], schedule=SCHEDULES[schedule])
    assert isinstance(made, FlowSolverScheduler)
    stock = case.stock(made, 4)
    run = sample(
        case.denoiser,
        case.start(made.noise_levels).double(),  # in float32 some lose digits at the first level
        solver=make_solver(**SOLVERS[name]),
        sigmas=made.noise_levels,
        cond=case.cond,
        return_trajectory=True,
    )
    expected = (run.x[-1] / (1 + float(made.noise_levels[-1]))).float()
    torch.testing.assert_close(stock, case.packed(expected), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert run.nfe == len(made.timesteps) * (1 if case.flux else 2)


def test_the_levels_are_those_of_the_pipeline(case):
    for options in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        case.pipe.scheduler = STOCK(**options)
        made = scheduler_for(case.pipe)
        case.stock(STOCK(**options), 3)
        times = case.pipe.scheduler.sigmas.double()
        case.stock(made, 3)
        torch.testing.assert_close(made.sigmas.double(), times, rtol=1e-6, atol=0)
        levels = made.noise_levels
        torch.testing.assert_close(levels / (1 + levels), times, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_stochastic_sampler(num_steps):
    case = Case("FLUX")
    sigmas = make_schedule("flow", num_steps=num_steps, shift=2.0)
    made = student_scheduler(case.pipe, Distilled(tuple(sigmas.tolist()), "stochastic"))
    torch.manual_seed(6)  # which the pipeline's own generator is no part of
    stock = case.stock(made, num_steps)
    shape = case.packed(case.noise).shape

    def draw(**_):
        return diffusers.FluxPipeline._unpack_latents(torch.randn(shape), 8, 12, 2)

    torch.manual_seed(6)
    flow = ProbabilityFlow(case.denoiser, case.cond)
    with torch.no_grad():
        *_, ours = integrate(
            flow,
            case.noise * sigmas[0].float(),
            StochasticEuler(),
            intervals(sigmas, 2),
            SimpleNamespace(draw=draw),
        )
    close(stock, case.packed(ours))


def test_a_learned_stage_within_a_step(case):
    predictor = TabulatedPredictor(r=[0.3, 0.6, 0.5], scale_dir=[1.01, 0.99, 1.0], scale_time=[1.1, 0.95, 1.0])
    plugin = AMEDPlugin(make_solver("dpm2"), predictor)
    sigmas = torch.tensor([999.0, 5.0, 1.0, 0.0])
    stock = case.stock(scheduler_for(case.pipe, solver=plugin, sigmas=sigmas), 3)
    with torch.no_grad():
        ours = sample(case.denoiser, case.start(sigmas), solver=plugin, sigmas=sigmas, cond=case.cond)
    torch.testing.assert_close(stock, case.packed(ours), rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["euler", "dpm3", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_pipelines_that_scale_neither_noise_nor_input(name, num_steps):
    levels = diffusers.DDPMScheduler(clip_sample=False)
    classes, plain = dit(num_embeds_ada_norm=1000), unet_2d(num_class_embeds=None)
    for pipe, cond in (
        (diffusers.DiTPipeline(transformer=classes, vae=vae(), scheduler=levels), torch.tensor([7, 999])),
        (diffusers.DDPMPipeline(plain, levels), None),
    ):
        pipe.set_progress_bar_config(disable=True)
        parts = from_pipeline(pipe)
        pipe.scheduler = scheduler_for(pipe, solver=SOLVERS[name])
        options = {"batch_size": 2} if cond is None else {"class_labels": cond.tolist(), "guidance_scale": W + 1}
        draw = torch.Generator().manual_seed(4)
        stock = pipe(generator=draw, num_inference_steps=num_steps, output_type="np", **options).images
        noise = torch.randn(2, *parts.denoiser.data_shape, generator=draw.manual_seed(4))
        sigmas = pipe.scheduler.noise_levels
        start = as_in_stock_pipelines(noise, float(sigmas[0]))
        denoiser = parts.denoiser if cond is None else guided(parts.denoiser, W)
        ours = sample(denoiser, start, solver=make_solver(**SOLVERS[name]), sigmas=sigmas, cond=cond)
        images = ours if parts.codec is None else parts.codec.decode(ours)
        expected = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        torch.testing.assert_close(torch.from_numpy(stock), expected, rtol=1e-4, atol=1e-4)


def test_where_image_to_image_begins_and_a_scheduler_as_a_file(tmp_path, case):
    case.pipe.scheduler = STOCK(shift=2.0)
    scheduler_for(case.pipe, solver={"name": "heun"}).save_pretrained(tmp_path)
    made, stock = FlowSolverScheduler.from_pretrained(tmp_path), STOCK(shift=2.0)
    assert type(made.solver).__name__ == "Heun"
    for scheduler in (made, stock):
        scheduler.set_timesteps(4)
    torch.testing.assert_close(made.timesteps[2], stock.timesteps[1])
    x, t = case.noise, stock.timesteps[1:2]
    close(made.scale_noise(x, t, x.flip(0)), stock.scale_noise(x, t.expand(len(x)), x.flip(0)))
    made.set_begin_index(2)
    ask = x * 0.5
    assert torch.equal(made.scale_model_input(ask), ask)


def test_half_precision_latents_stay_so(case):
    made = scheduler_for(case.pipe, solver={"name": "dpmpp", "order": 2})
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        made.set_timesteps(4)
        z = case.noise.to(dtype)
        for t in made.timesteps:
            z = made.step(0.1 * z.sin(), t, z).prev_sample
        assert z.dtype == dtype
        ends.append(z.float())
    torch.testing.assert_close(*ends, rtol=0.05, atol=0.05)


def test_what_flow_pipelines_have_no_place_for(case):
    with pytest.raises(ValueError, match="analytical first step"):
        scheduler_for(case.pipe, solver={"name": "ipndm", "afs": True})
    steps = make_learned("steps", sigmas=[9.0, 1.0, 0.0], predictor={"name": "table"}, inner={"name": "ipndm"})
    with torch.no_grad():
        for parameter in steps.solver.predictor.parameters():
            parameter.fill_(0.3)
    with pytest.raises(ValueError, match="moves the first evaluation"):
        case.stock(scheduler_for(case.pipe, solver=steps), 2)
    with pytest.raises(ValueError, match="3 steps"):
        case.stock(scheduler_for(case.pipe, sigmas=[9.0, 2.0, 1.0, 0.0]), 4)
