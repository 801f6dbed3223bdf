"""Out to stock pipelines: exported students, and our solvers as schedulers, equal our own sampler."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.denoiser import Distilled
from diffdistill.editing import Known, inpaint, noised
from diffdistill.editing.session import TASKS, Edit, mask_channels, takes_mask
from diffdistill.generation import Plan
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_network, from_pipeline
from diffdistill.interop.diffusers.export import export_student
from diffdistill.interop.diffusers.levels import sigma_table
from diffdistill.interop.diffusers.scheduler import SolverScheduler, scheduler_for, student_scheduler
from diffdistill.learned.files import load_predictor, make_learned, save_predictor
from diffdistill.models import guidance_student, guided
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import (
    AMEDPlugin,
    AMEDPredictor,
    ProbabilityFlow,
    TabulatedPredictor,
    integrate,
    intervals,
    make_schedule,
    make_solver,
)
from tests.interop.diffusers.builders import diffusers, pipeline, scheduler, sdxl_pipeline, text_batch, unet

PROMPTS = ["a cat", "dog"]


def grid(num_steps):
    return make_schedule("trailing", num_steps=num_steps, table=sigma_table(scheduler()))


def student_of(teacher, sigmas=None, sampler="deterministic"):
    """A student whose answer depends on w."""
    student = guidance_student(teacher.denoiser, (0.0, 14.0))
    torch.manual_seed(3)
    torch.nn.init.normal_(student.model.module.time_embedding.cond_proj.weight, std=0.3)
    student.distilled = None if sigmas is None else Distilled(tuple(sigmas.tolist()), sampler)
    return student.eval()


@pytest.fixture(scope="module")
def teacher():
    return from_pipeline(pipeline())


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    """The pipeline read back from an exported folder, with the student it was made from."""
    folder = tmp_path_factory.mktemp("export") / "student"
    student = student_of(teacher)
    export_student(student, teacher, folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, student, folder


def components(pipe, kind):
    made = getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 3, 8])
def test_text_to_image(exported, teacher, num_steps, scale):
    pipe, student, _ = exported
    noise, sigmas = torch.randn(2, 4, 8, 8), grid(num_steps)
    options = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent"}
    stock = pipe(PROMPTS, latents=noise.clone(), **options).images
    denoiser = guided(student, float(scale - 1))
    start = as_in_stock_pipelines(noise, float(sigmas[0]))
    ours = sample(denoiser, start, solver=make_solver("euler"), sigmas=sigmas, cond=teacher.prompts(PROMPTS))
    close(stock, ours)
    other = sample(
        guided(student, scale - 0.5), start, solver=make_solver("euler"), sigmas=sigmas, cond=teacher.prompts(PROMPTS)
    )
    assert (other - ours).abs().max() > 1e-3  # so that w is in what was compared


@pytest.fixture(scope="module")
def exported_xl(tmp_path_factory):
    """The same of SDXL, with its teacher."""
    teacher = from_pipeline(sdxl_pipeline(scheduler("EulerDiscreteScheduler")))
    student = student_of(teacher)
    folder = export_student(student, teacher, tmp_path_factory.mktemp("export") / "student")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, student, teacher


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 3, 8])
def test_text_to_image_with_sdxl(exported_xl, num_steps, scale):
    pipe, student, teacher = exported_xl
    noise, sigmas = torch.randn(2, 4, 8, 8), grid(num_steps)
    options = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent"}
    stock = pipe(PROMPTS, latents=noise.clone(), **options).images
    start = as_in_stock_pipelines(noise, float(sigmas[0]))
    denoiser, cond = guided(student, float(scale - 1)), teacher.prompts(PROMPTS)
    close(stock, sample(denoiser, start, solver=make_solver("euler"), sigmas=sigmas, cond=cond))


@pytest.mark.parametrize(("num_steps", "strength"), [(1, 1.0), (2, 0.5), (4, 0.75), (8, 0.5)])
@pytest.mark.parametrize("scale", [1, 3, 8])
def test_image_to_image(exported, teacher, num_steps, strength, scale):
    pipe, student, _ = exported
    images, sigmas = torch.rand(2, 3, 16, 16) * 2 - 1, grid(num_steps)
    stock = components(pipe, "StableDiffusionImg2ImgPipeline")(
        PROMPTS,
        image=(images + 1) / 2,
        strength=strength,
        num_inference_steps=num_steps,
        guidance_scale=scale,
        output_type="latent",
        generator=torch.Generator().manual_seed(4),
    ).images
    generator = torch.Generator().manual_seed(4)
    latents = teacher.codec.encode(images, generator)
    start = noised(latents, sigmas, strength, torch.randn(latents.shape, generator=generator))
    flow = ProbabilityFlow(guided(student, float(scale - 1)), teacher.prompts(PROMPTS))
    with torch.no_grad():
        *_, ours = integrate(flow, start.x, make_solver("euler"), intervals(start.sigmas, 2))
    close(stock, ours)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1, 3, 8])
def test_inpainting_by_replacement(exported, teacher, num_steps, scale):
    pipe, student, _ = exported
    images, sigmas = torch.rand(2, 3, 16, 16) * 2 - 1, grid(num_steps)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:10, 2:14] = 1
    noise = torch.randn(2, 4, 8, 8)
    stock = components(pipe, "StableDiffusionInpaintPipeline")(
        PROMPTS,
        image=(images + 1) / 2,
        mask_image=mask,
        strength=1.0,
        num_inference_steps=num_steps,
        guidance_scale=scale,
        output_type="latent",
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(4),
    ).images
    latents = teacher.codec.encode(images, torch.Generator().manual_seed(4))
    known = Known(latents, 1 - torch.nn.functional.interpolate(mask, (8, 8)))
    # The stock loop starts from noise of unit variance, and blends at the level's own noise from then on.
    first = as_in_stock_pipelines(noise, float(sigmas[0])) * sigmas[0].float()
    denoiser, cond = guided(student, float(scale - 1)), teacher.prompts(PROMPTS)
    ours = inpaint(denoiser, known, noise, solver=make_solver("euler"), sigmas=sigmas, cond=cond, start=first)
    close(stock, ours)


def test_inpainting_by_mask_channels():
    """Equal to the stock pipeline of such models, with the guidance of classifier-free guidance."""
    pipe = pipeline(
        "StableDiffusionInpaintPipeline",
        network=unet(in_channels=9),
        schedule=scheduler(
            "DPMSolverMultistepScheduler", solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero"
        ),
    )
    parts = from_pipeline(pipe)
    images, noise, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8), torch.zeros(1, 1, 16, 16)
    mask[:, :, 4:10, 2:14] = 1
    known = Known(images, 1 - mask)
    plan = Plan(guided(parts.denoiser, 2.0), make_solver("euler"), grid(4))
    edit = Edit(images=images, plan=plan, cond=parts.prompts(PROMPTS), codec=parts.codec)
    assert takes_mask(plan.denoiser)
    channels = mask_channels(edit, known)
    stock = pipe(
        PROMPTS,
        image=(images + 1) / 2,
        mask_image=mask.expand(2, 1, 16, 16),
        masked_image_latents=channels[:, 1:],
        num_inference_steps=4,
        guidance_scale=3.0,
        strength=1.0,
        output_type="latent",
        latents=noise.clone(),
    ).images
    start = as_in_stock_pipelines(noise, float(grid(4)[0]))
    cond = {**edit.cond, "channels": channels}
    ours = sample(plan.denoiser, start, solver=plan.solver, sigmas=plan.sigmas, cond=cond)
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    made = TASKS["inpaint"](Edit(**{**edit.__dict__, "known": known.mask}))
    assert torch.equal(torch.where(known.mask.bool(), made, images), images)


def test_the_exported_folder_says_what_it_is(exported, teacher, tmp_path):
    _, student, folder = exported
    record = json.loads((folder / "unet/config.json").read_text())
    assert record["time_cond_proj_dim"] == 256
    assert record["guidance_convention"]["guidance_scale_range"] == [1, 15]
    card = (folder / "README.md").read_text()
    assert "negative prompt has no effect" in card and "1 to 15" in card
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    names = ("_class_name", "solver_order", "algorithm_type", "final_sigmas_type", "timestep_spacing", "steps_offset")
    assert [config[n] for n in names] == ["DPMSolverMultistepScheduler", 1, "dpmsolver++", "zero", "trailing", 1]
    loaded = load_denoiser(folder)
    assert loaded.w_range == (0.0, 14.0)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.0, 11.0]).double()
    with torch.no_grad():
        expected = guided(student, 5.0)(x, sigma, text_batch())
        torch.testing.assert_close(guided(loaded, 5.0)(x, sigma, text_batch()), expected, rtol=1e-4, atol=1e-4)
    few = student_of(teacher, grid(4))
    export_student(few, teacher, tmp_path / "few")
    assert load_denoiser(tmp_path / "few").distilled == few.distilled


def test_what_cannot_be_exported_is_refused(teacher, tmp_path):
    refusals = {
        "guidance_student": teacher.denoiser,
        "stochastic": student_of(teacher, grid(4), "stochastic"),
        "trailing": student_of(teacher, torch.tensor([14.6, 1.0, 0.0])),
    }
    for match, student in refusals.items():
        with pytest.raises(ValueError, match=match):
            export_student(student, teacher, tmp_path / "out")
    scaled = from_network(unet(w_channels=256), scheduler(), guidance_convention="scale", w_range=(0, 4))
    with pytest.raises(ValueError, match="guidance_convention"):
        export_student(scaled, teacher, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_student(student_of(teacher), teacher, tmp_path / "full")
    assert not (tmp_path / "out").exists()


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
    sigmas = pipe.scheduler.sigmas
    run = sample(
        guided(teacher.denoiser, 2.0),
        noise,
        solver=make_solver(**SOLVERS[name]),
        sigmas=sigmas,
        cond=cond,
        return_trajectory=True,
    )
    torch.testing.assert_close(stock, run.x[-1], rtol=1e-4, atol=1e-4 * float(run.x[-1].abs().max()))
    assert run.nfe == 2 * len(pipe.scheduler.timesteps)


PREDICTORS = {
    "fixed": lambda: TabulatedPredictor(r=[0.3, 0.6, 0.5], scale_dir=[1.01, 0.99, 1.0], scale_time=[1.1, 0.95, 1.0]),
    "learned": lambda: AMEDPredictor(scale_dir=0.01, scale_time=0.2),
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
        ours = sample(guided(teacher.denoiser, 2.0), noise, solver=plugin, sigmas=sigmas, cond=teacher.prompts(["cat"]))
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
        ours = learned.sample(guided(teacher.denoiser, 2.0), noise, teacher.prompts(["cat"]))
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
        *_, ours = integrate(flow, noise * grid(4)[0].float(), StochasticEuler(), intervals(grid(4), 2), stream)
    close(stock, ours)
    with pytest.raises(ValueError, match="4 steps"):
        pipe(PROMPTS, num_inference_steps=3)


def test_our_scheduler_in_image_to_image_and_as_a_file(teacher, tmp_path):
    base = pipeline(network=teacher.pipeline.unet)
    scheduler_for(base, solver={"name": "dpm2"}).save_pretrained(tmp_path)
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
    apart = AMEDPlugin(make_solver("dpm2"), lambda features, sigma, sigma_next: made_apart(sigma))
    pipe = pipeline(network=teacher.pipeline.unet)
    pipe.scheduler = scheduler_for(pipe, solver=apart)
    with pytest.raises(ValueError, match="one image at a time"):
        pipe(PROMPTS, num_inference_steps=3, output_type="latent")


def made_apart(sigma):
    from diffdistill.solvers import Correction

    return Correction(r=torch.linspace(0.3, 0.6, len(sigma), dtype=torch.float64))
