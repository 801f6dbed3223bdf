"""Out to stock pipelines: exported students equal our own sampler."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.editing import Known, inpaint, noised
from diffdistill.editing.session import TASKS, Edit, mask_channels, takes_mask
from diffdistill.interop.diffusers import as_in_stock_pipelines, from_network, from_pipeline
from diffdistill.interop.diffusers.export import export_student
from diffdistill.models import guided
from diffdistill.sampling.plans import Plan
from diffdistill.solvers import ProbabilityFlow, integrate, intervals, make_solver
from tests.interop.diffusers.builders import diffusers, pipeline, scheduler, sdxl_pipeline, text_batch, unet
from tests.interop.diffusers.stock import PROMPTS, close, components, grid, student_of


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
    others = {
        "prediction is eps, that of the pipeline v": pipeline(schedule=scheduler(prediction_type="v_prediction")),
        "sigma_max": pipeline(schedule=scheduler(beta_end=0.02)),
        "in_channels is 4, that of the pipeline 9": pipeline(network=unet(in_channels=9)),
        "cross_attention_dim is 12, that of the pipeline 22": sdxl_pipeline(scheduler("EulerDiscreteScheduler")),
    }
    for match, other in others.items():
        with pytest.raises(ValueError, match=match):
            export_student(student_of(teacher), from_pipeline(other), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_student(student_of(teacher), teacher, tmp_path / "full")
    assert not (tmp_path / "out").exists()
