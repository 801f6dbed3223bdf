"""Our solvers as schedulers of stock pipelines equal our own sampler, and stock schedulers equal our solvers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import sample
from diffdistill.editing import noised
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_pipeline
from diffdistill.interop.diffusers.levels import sigma_table
from diffdistill.interop.diffusers.scheduler import SolverScheduler, scheduler_for, student_scheduler
from diffdistill.learned.storage import load_predictor, make_learned, save_predictor
from diffdistill.models import guided
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import (
    AMEDPlugin,
    AMEDPredictor,
    Correction,
    ProbabilityFlow,
    TabulatedPredictor,
    integrate,
    intervals,
    make_solver,
)
from tests.interop.diffusers.builders import pipeline, scheduler, text_batch
from tests.interop.diffusers.stock import PROMPTS, close, components, grid, student_of


@pytest.fixture(scope="module")
def teacher():
    return from_pipeline(pipeline())


STOCK = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, {"name": "ddim"}),
    "dpmpp": ("DPMSolverMultistepScheduler", {"lower_order_final": True}, {"name": "dpmpp", "order": 2}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "final_sigmas_type": "zero"},
        {"name": "unipc", "order": 2},
    ),
}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("num_steps", [2, 5, 10])
def test_solvers_equal_the_stock_schedulers_on_the_same_timesteps(name, num_steps, teacher):
    kind, options, ours = STOCK[name]
    stock = scheduler(kind, timestep_spacing="trailing", **options)
    stock.set_timesteps(num_steps)
    cond, z = text_batch(), torch.randn(3, 4, 8, 8)
    levels = sigma_table(stock)[stock.timesteps]
    with torch.no_grad():
        latents = z.clone()
        for t in stock.timesteps:
            latents = stock.step(teacher.denoiser.model.module(latents, t, **cond).sample, t, latents).prev_sample
    sigmas = torch.cat([levels, levels.new_zeros(1)])
    start = as_in_stock_pipelines(z, float(levels[0]))
    x = sample(teacher.denoiser, start, solver=make_solver(**ours), sigmas=sigmas, cond=cond)
    torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))


SOLVERS = {
    "euler": {"name": "euler"},
    "heun": {"name": "heun"},
    "dpm2": {"name": "dpm2"},
    "dpm3": {"name": "dpm3"},
    "ipndm with afs": {"name": "ipndm", "order": 3, "afs": True},
    "unipc": {"name": "unipc", "order": 3},
    "dpm2 with afs": {"name": "dpm2", "afs": True},
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", [None, {"name": "polynomial", "rho": 5.0}])
def test_any_solver_runs_in_a_stock_pipeline(name, schedule, teacher):
    """With classifier-free guidance by the pipeline, equal to ours."""
    pipe = pipeline(network=teacher.pipeline.unet)
    pipe.scheduler = scheduler_for(pipe, solver=SOLVERS[name], schedule=schedule)
    noise = torch.randn(2, 4, 8, 8)
    stock = pipe(PROMPTS, latents=noise.clone(), num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
    cond = teacher.prompts(PROMPTS)
    sigmas = pipe.scheduler.noise_levels
    run = sample(
        guided(teacher.denoiser, 2.0),
        as_in_stock_pipelines(noise, float(sigmas[0])),
        solver=make_solver(**SOLVERS[name]),
        sigmas=sigmas,
        cond=cond,
        return_trajectory=True,
    )
    expected = run.x[-1] / (1 + float(sigmas[-1]) ** 2) ** 0.5  # latents of this pipeline have the network's units
    torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert run.nfe == 2 * len(pipe.scheduler.timesteps)


PREDICTORS = {
    "fixed": lambda: TabulatedPredictor(r=[0.3, 0.6, 0.5], scale_dir=[1.01, 0.99, 1.0], scale_time=[1.1, 0.95, 1.0]),
    "learned": lambda: AMEDPredictor(scale_dir=0.01, scale_time=0.2, initial="published"),
}


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("inner", ["ipndm", "dpm2"])
def test_amed_plugin_in_a_stock_pipeline(predictor, inner, teacher):
    torch.manual_seed(1)
    made = PREDICTORS[predictor]()
    if predictor == "learned":
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    plugin = AMEDPlugin(make_solver(inner, afs=True), made)
    pipe = pipeline(network=teacher.pipeline.unet)
    sigmas = torch.tensor([14.0, 5.0, 1.0, 0.1])
    pipe.scheduler = scheduler_for(pipe, solver=plugin, sigmas=sigmas)
    noise = torch.randn(1, 4, 8, 8)
    stock = pipe("cat", latents=noise.clone(), num_inference_steps=3, guidance_scale=3.0, output_type="latent").images
    with torch.no_grad():
        start = as_in_stock_pipelines(noise, 14.0)
        ours = sample(guided(teacher.denoiser, 2.0), start, solver=plugin, sigmas=sigmas, cond=teacher.prompts(["cat"]))
    ours = ours / 1.01**0.5
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


LEARNED = {
    "amed": {"predictor": {"name": "amed"}, "inner": {"afs": True}},
    "plugin": {"predictor": {"name": "table"}, "inner": {"name": "dpmpp", "order": 2}},
    "steps": {"predictor": {"name": "table"}, "inner": {"name": "ipndm", "order": 3, "afs": True}},
}


@pytest.mark.parametrize("form", LEARNED)
def test_learned_solvers_from_their_files_in_a_stock_pipeline(form, teacher, tmp_path):
    made = make_learned(form, sigmas=torch.tensor([14.0, 5.0, 1.0, 0.1]), **LEARNED[form])
    with torch.no_grad():
        for parameter in made.solver.predictor.parameters():
            parameter.normal_(std=0.3)
    save_predictor(made, tmp_path / "predictor.safetensors")
    learned = load_predictor(tmp_path / "predictor.safetensors")
    pipe = pipeline(network=teacher.pipeline.unet)
    pipe.scheduler = scheduler_for(pipe, solver=learned)
    noise = torch.randn(1, 4, 8, 8)
    stock = pipe("cat", latents=noise.clone(), num_inference_steps=3, guidance_scale=3.0, output_type="latent").images
    with torch.no_grad():
        start = as_in_stock_pipelines(noise, 14.0)
        ours = learned.sample(guided(teacher.denoiser, 2.0), start, teacher.prompts(["cat"])) / 1.01**0.5
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    assert len(pipe.scheduler.timesteps) == learned.nfe
    with pytest.raises(ValueError, match="brings its own"):
        scheduler_for(pipe, solver=learned, sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="analytic start"):
        scheduler_for(pipe, solver=replace(learned, start={"statistics": "digits-teacher", "sigma": 3.5}))


def test_the_stochastic_sampler_in_a_stock_pipeline(teacher):
    student = student_of(teacher, grid(4), "stochastic")
    pipe = pipeline(network=student.model.module)
    pipe.scheduler = student_scheduler(pipe, student.distilled)
    noise = torch.randn(2, 4, 8, 8)
    stock = pipe(
        PROMPTS,
        latents=noise.clone(),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(6),
    ).images
    generator = torch.Generator().manual_seed(6)
    stream = SimpleNamespace(draw=lambda **_: torch.randn(noise.shape, generator=generator))
    flow = ProbabilityFlow(guided(student, 2.0), teacher.prompts(PROMPTS))
    with torch.no_grad():
        start = as_in_stock_pipelines(noise, float(grid(4)[0])) * grid(4)[0].float()
        *_, ours = integrate(flow, start, StochasticEuler(), intervals(grid(4), 2), stream)
    close(stock, ours)
    with pytest.raises(ValueError, match="4 steps"):
        pipe(PROMPTS, num_inference_steps=3)


def test_our_scheduler_in_image_to_image_and_as_a_file(teacher, tmp_path):
    base = pipeline(network=teacher.pipeline.unet)
    scheduler_for(base, solver="dpm2", schedule="trailing").save_pretrained(tmp_path)
    base.scheduler = SolverScheduler.from_pretrained(tmp_path)
    pipe = components(base, "StableDiffusionImg2ImgPipeline")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    stock = pipe(
        PROMPTS,
        image=(images + 1) / 2,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(4),
    ).images
    generator = torch.Generator().manual_seed(4)
    latents = teacher.codec.encode(images, generator)
    start = noised(latents, grid(4), 0.5, torch.randn(latents.shape, generator=generator))
    flow = ProbabilityFlow(guided(teacher.denoiser, 2.0), teacher.prompts(PROMPTS))
    with torch.no_grad():
        *_, ours = integrate(flow, start.x, make_solver("dpm2"), intervals(start.sigmas, 2))
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_what_the_scheduler_refuses(teacher):
    with pytest.raises(ValueError, match="edm_sde"):
        scheduler_for(teacher.pipeline, solver={"name": "edm_sde"})
    with pytest.raises(ValueError, match="nope"):
        scheduler_for(teacher.pipeline, solver={"name": "nope"})
    with pytest.raises(TypeError, match="name"):
        scheduler_for(teacher.pipeline, solver={"order": 2})
    base = pipeline(network=teacher.pipeline.unet)
    base.scheduler = scheduler_for(base, solver={"name": "euler", "afs": True})
    edits = components(base, "StableDiffusionImg2ImgPipeline")
    options = {"image": torch.rand(1, 3, 16, 16), "num_inference_steps": 4, "output_type": "latent"}
    for strength in (0.5, 1.0):
        with pytest.raises(ValueError, match="afs=False"):
            edits("cat", strength=strength, **options)
    base.scheduler = edits.scheduler = scheduler_for(base)
    with pytest.raises(ValueError, match="strength below 1 / 4"):
        edits("cat", strength=0.1, **options)
    apart = AMEDPlugin(make_solver("dpm2"), lambda features, sigma, sigma_next: made_apart(sigma))
    pipe = pipeline(network=teacher.pipeline.unet)
    pipe.scheduler = scheduler_for(pipe, solver=apart)
    with pytest.raises(ValueError, match="one image at a time"):
        pipe(PROMPTS, num_inference_steps=3, output_type="latent")


def made_apart(sigma):
    return Correction(r=torch.linspace(0.3, 0.6, len(sigma), dtype=torch.float64))
