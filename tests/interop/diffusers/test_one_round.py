"""Students of one round on networks of diffusers: in the stock pipelines, and flow maps of every family."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.interop.diffusers import Parts, add_adapters, as_in_stock_pipelines, from_network
from diffdistill.interop.diffusers.export import export_student
from diffdistill.models import flow_map_student, guidance_student, save_denoiser
from diffdistill.progressive.methods import distill
from diffdistill.progressive.targets import eulerian_target
from diffdistill.sampling.plans import plan
from diffdistill.solvers import make_schedule
from diffdistill.training import Run
from diffdistill.training.weighting import make_weighting
from tests.interop.diffusers.builders import diffusers, filled, flux, pipeline, scheduler, text_batch, unet
from tests.interop.diffusers.stock import close, grid
from tests.interop.diffusers.test_families import FAMILIES, inputs
from tests.interop.diffusers.test_flux import FLOW, NULL, SHIFT, Latents, drawn, exported, pack, prompts

METHODS = {
    "trajectory": {"num_steps": 2, "points": 1, "solver": {"name": "euler"}},
    "consistency": {"num_steps": 2, "fine": [1, 2]},
}


def student_of(method, teacher, data, schedule, folder):
    """A student of two steps after three updates."""
    trainer = {"updates": 3, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "ema_half_life": None}
    (path,) = distill(
        teacher,
        data,
        Run(folder, {}),
        method=method,
        options=METHODS[method],
        schedule=schedule,
        weighting=make_weighting("snr_plus_one"),
        trainer={**trainer, "precision": "fp32"},
    ).values()
    return load_denoiser(path)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_flux_in_the_stock_pipeline(method, tmp_path):
    teacher = from_network(filled(flux()), FLOW(), null=NULL, w_range=(0.0, 7.0))
    schedule = lambda n: make_schedule("flow", num_steps=n, shift=SHIFT)  # noqa: E731
    student = student_of(method, copy.deepcopy(teacher), Latents(), schedule, tmp_path / "run")
    stock = exported(student, teacher, tmp_path / "out")
    noise, cond = torch.randn(2, 4, 6, 8), prompts(2)
    for scale in (1.0, 6.0):
        planned = plan(student, w=scale - 1)
        ours = sample(planned.denoiser, noise, solver=planned.solver, sigmas=planned.sigmas, cond=cond)
        close(drawn(stock, noise, cond, num_inference_steps=2, guidance_scale=scale), pack(ours))


class Texts:
    """Eight latents with embeddings."""

    def __init__(self):
        self.held = {"x": torch.randn(8, 4, 8, 8), "y.encoder_hidden_states": torch.randn(8, 7, 12)}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.held.items()}

    def tensors(self):
        return self.held


@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_stable_diffusion_in_the_stock_pipeline(method, tmp_path):
    torch.manual_seed(0)
    pipe = pipeline(network=unet())
    teacher = from_network(pipe.unet, scheduler())
    one = add_adapters(guidance_student(teacher, (0.0, 14.0)), rank=2)
    torch.nn.init.normal_(one.model.module.time_embedding.cond_proj.weight, std=0.3)
    student = student_of(method, one, Texts(), grid, tmp_path / "run")
    folder = export_student(student, Parts(teacher, None, None, pipe), tmp_path / "out")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    noise, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 12)
    ends = {}
    for scale in (1.5, 8.0):
        planned = plan(student, w=scale - 1)
        start = as_in_stock_pipelines(noise, float(planned.sigmas[0]))
        options = {"solver": planned.solver, "sigmas": planned.sigmas, "cond": {"encoder_hidden_states": cond}}
        ends[scale] = sample(planned.denoiser, start, **options)
        found = stock(
            prompt_embeds=cond,
            latents=noise.clone(),
            num_inference_steps=2,
            guidance_scale=scale,
            output_type="latent",
        ).images
        close(found, ends[scale])
    assert (ends[1.5] - ends[8.0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_map_of_every_family(family, tmp_path):
    teacher, cond = FAMILIES[family]()
    x, sigma = inputs(teacher)
    one = guidance_student(teacher, (0.0, 7.0))
    student, w = flow_map_student(one), torch.tensor([0.0, 2.0, 5.0])
    s = 0.3 * sigma
    with torch.no_grad():
        expected = one(x, sigma, cond, w=w)
        torch.testing.assert_close(student(x, sigma, cond, w=w, s=s), expected)
        student.model.map_s.weight.normal_()
        told = student(x, sigma, cond, w=w, s=s)
        assert (told - expected).abs().max() > 1e-5
    _, target = eulerian_target(
        lambda x, sigma, cond: one(x, sigma, cond, w=w),
        lambda x, sigma, cond: student(x, sigma, cond, w=w, s=s),
        *(x, sigma, s, cond),
        ramp=1.0,
    )
    assert target.isfinite().all() and (target - told).abs().max() > 1e-6
    save_denoiser(student, tmp_path / "map.safetensors")
    with torch.no_grad():
        again = load_denoiser(tmp_path / "map.safetensors")
        assert again.flow_map
        torch.testing.assert_close(again(x, sigma, cond, w=w, s=s), told, rtol=1e-3, atol=1e-4)


def test_stock_pipelines_get_no_flow_map(tmp_path):
    pipe = pipeline(network=unet())
    teacher = from_network(pipe.unet, scheduler())
    student = flow_map_student(guidance_student(teacher, (0.0, 14.0)))
    with pytest.raises(ValueError, match="do not tell a network where a step ends"):
        export_student(student, Parts(teacher, None, None, pipe), tmp_path / "out")


def test_with_adapters_the_input_for_s_is_trained_too():
    one = guidance_student(from_network(unet(), scheduler()), (0.0, 14.0))
    student = add_adapters(flow_map_student(one), rank=2)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert "model.map_s.weight" in trained and all("lora_" in n or "map_s" in n or "cond_proj" in n for n in trained)
    student(torch.randn(2, 4, 8, 8), torch.ones(2).double(), {k: v[:2] for k, v in text_batch().items()})
