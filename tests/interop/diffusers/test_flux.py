"""FLUX students, of stage 1 and of few steps, in the stock pipeline."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.denoiser import Distilled
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.interop.diffusers import Parts, as_in_stock_pipelines, from_network, from_pipeline
from diffdistill.interop.diffusers.export import export_student
from diffdistill.models import guidance_student, guided
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.sampling.plans import plan
from diffdistill.solvers import make_schedule, make_solver
from diffdistill.training import Run, Trainer
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting
from tests.interop.diffusers.builders import diffusers, filled, flux, flux_pipeline, pooled_text, vae
from tests.interop.diffusers.stock import close
from tests.training.problems import settings

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
NULL = {"encoder_hidden_states": torch.zeros(5, 10), "pooled_projections": torch.zeros(6)}


class Latents:
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(8, 4, 6, 8, generator=generator)
        self.held = {"x": x, **{f"y.{name}": value for name, value in pooled_text(8).items()}}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.held.items()}

    def tensors(self):
        return self.held


def exported(student, teacher, folder):
    """The stock pipeline of the student's folder."""
    pipe = diffusers.FluxPipeline(FLOW(), vae(), None, None, None, None, flux(guidance_embeds=False))
    folder = export_student(student, Parts(teacher, None, None, pipe), folder)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    stock = diffusers.FluxPipeline.from_pretrained(folder, **absent)
    stock.set_progress_bar_config(disable=True)
    return stock


def prompts(count):
    return {name: value[:count] for name, value in pooled_text(8).items()}


def pack(latents):
    return diffusers.FluxPipeline._pack_latents(latents, len(latents), 4, 6, 8)


def drawn(pipe, noise, cond, **options):
    """Packed latents from the stock pipeline."""
    return pipe(
        prompt_embeds=cond["encoder_hidden_states"],
        pooled_prompt_embeds=cond["pooled_projections"],
        latents=pack(noise),
        height=12,
        width=16,
        output_type="latent",
        **options,
    ).images


def test_stage_one_of_flux_runs_in_the_stock_pipeline(tmp_path):
    """A student in FLUX's convention: the pipeline passes its guidance scale, w + 1, to `guidance_embeds`."""
    teacher = from_network(filled(flux(guidance_embeds=False)), FLOW(), null=NULL)
    objective = GuidanceDistillation(
        teacher,
        guidance_student(teacher, (0.0, 7.0)),
        noise_levels=make_noise_levels("on_schedule", sigmas=torch.tensor([2.0, 1.0, 0.5])),
        weighting=make_weighting("snr_plus_one", sigma_data=1.0),
    )
    fast = {"updates": 40, "batch_size": 8, "learning_rate": 5e-3, "decay": "linear", "ema_half_life": None}
    run = Run(tmp_path / "run", {})
    student = Trainer(objective, Latents(), settings(**fast, log_every=10), run).train()
    losses = [record["loss"] for record in run.metrics()]
    print(f"loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    assert losses[-1] < losses[0] / 2
    stock = exported(student, teacher, tmp_path / "out")
    assert stock.transformer.config.guidance_embeds
    noise, cond = torch.randn(2, 4, 6, 8), prompts(2)
    for scale in (1.0, 3.0, 8.0):
        latents = drawn(stock, noise, cond, num_inference_steps=3, guidance_scale=scale)
        z, times = noise, stock.scheduler.sigmas
        with torch.no_grad():
            for t, t_next in zip(times[:-1], times[1:], strict=True):
                velocity = student.model(z, t.expand(2), cond, torch.full((2,), scale - 1))
                z = z + (t_next - t) * velocity
        close(latents, pack(z))
    assert from_network(stock.transformer, FLOW()).w_range == (0.0, 7.0)


SHIFT = 3.0


@pytest.fixture(scope="module")
def stage_one():
    """A model that takes the guidance scale, as stage 1 leaves it."""
    return from_network(filled(flux()), FLOW(), null=NULL, w_range=(0.0, 7.0))


@pytest.fixture(scope="module")
def stage_two(stage_one, tmp_path_factory):
    """Students of 4, 2 and 1 steps."""
    halving = Halving(
        sigmas=make_schedule("flow", num_steps=8, shift=SHIFT),
        sampler="deterministic",
        weighting=make_weighting("snr_plus_one", sigma_data=1.0),
        trainer={"updates": 3, "batch_size": 8, "learning_rate": 1e-4, "device": "cpu", "ema_half_life": None},
        stages={4: {"updates": 60, "learning_rate": 2e-3, "decay": "linear", "warmup": 5}},
    )
    paths = halve_steps(stage_one, Latents(), halving, Run(tmp_path_factory.mktemp("two"), {}))
    return {num_steps: load_denoiser(path) for num_steps, path in paths.items()}


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_students_of_few_steps_run_in_the_stock_pipeline(num_steps, stage_one, stage_two, tmp_path):
    student = stage_two[num_steps]
    stock = exported(student, stage_one, tmp_path / "out")
    assert stock.scheduler.config.shift == (SHIFT if num_steps > 1 else 1.0)
    noise, cond = torch.randn(2, 4, 6, 8), prompts(2)
    ours = {}
    for scale in (1.0, 3.0, 8.0):
        planned = plan(student, w=scale - 1)
        ours[scale] = pack(sample(planned.denoiser, noise, solver=planned.solver, sigmas=planned.sigmas, cond=cond))
        close(drawn(stock, noise, cond, num_inference_steps=num_steps, guidance_scale=scale), ours[scale])
    assert (ours[1.0] - ours[8.0]).abs().max() > 1e-3  # so that w is in what was compared
    card = (tmp_path / "out/README.md").read_text()
    assert f"num_inference_steps={num_steps}" in card and "sigmas=" not in card and "cond_proj" not in card


def test_a_student_takes_the_way_of_its_teacher_in_half_the_steps(stage_one, stage_two):
    noise, cond = torch.randn(8, 4, 6, 8, generator=torch.Generator().manual_seed(1)), prompts(8)
    euler, teacher = make_solver("euler"), guided(stage_one, 2.0)
    grids = {n: make_schedule("flow", num_steps=n, shift=SHIFT) for n in (4, 8)}
    end, rough = (sample(teacher, noise, solver=euler, sigmas=grids[n], cond=cond) for n in (8, 4))
    few = sample(guided(stage_two[4], 2.0), noise, solver=euler, sigmas=grids[4], cond=cond)
    before, after = (float((x - end).square().mean().sqrt()) for x in (rough, few))
    print(f"distance to the teacher's 8 steps: its own 4 steps {before:.4g}, the student's {after:.4g}")
    assert after < before / 2


def test_levels_that_the_stock_scheduler_has_not_are_given_in_the_call(stage_one, tmp_path):
    """As the card says: the times of the student's levels, which here begin below noise alone."""
    student = from_network(stage_one.model.module, FLOW(), null=NULL, w_range=(0.0, 7.0))
    student.distilled = Distilled((999.0, 2.0, 0.7, 0.0))
    stock = exported(student, stage_one, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "sigmas=[0.999, 0.666666667, 0.411764706]" in card and "Pass sigmas= as above" in card
    noise, cond = torch.randn(2, 4, 6, 8), prompts(2)
    latents = drawn(stock, noise, cond, sigmas=[0.999, 0.666666667, 0.411764706], guidance_scale=4.0)
    sigmas = torch.tensor(student.distilled.sigmas)
    start = as_in_stock_pipelines(noise, 999.0, flow=True)
    close(latents, pack(sample(guided(student, 3.0), start, solver=make_solver("euler"), sigmas=sigmas, cond=cond)))


def test_the_folder_of_a_student_is_read_back(tmp_path):
    pipe = flux_pipeline()
    teacher = from_pipeline(pipe, w_range=(0.0, 7.0))
    student = teacher.denoiser
    student.distilled = Distilled(tuple(make_schedule("flow", num_steps=4).tolist()))
    loaded = load_denoiser(export_student(student, teacher, tmp_path / "out"))
    assert loaded.distilled == student.distilled and loaded.w_range == (0.0, 7.0)
    noise, sigma, cond = torch.randn(2, 4, 6, 8), torch.tensor([0.5, 2.0**26]), teacher.prompts(["a cat", "dog"])
    with torch.no_grad():
        x = noise * sigma.view(-1, 1, 1, 1)
        close(guided(loaded, 2.0)(x, sigma, cond), guided(student, 2.0)(x, sigma, cond))


def test_students_for_other_samplers_are_not_exported(stage_one, tmp_path):
    student = from_network(stage_one.model.module, FLOW(), null=NULL, w_range=(0.0, 7.0))
    for sampler in ("stochastic", "encoder"):
        student.distilled = Distilled((2.0, 1.0, 0.0), sampler)
        with pytest.raises(ValueError, match=f"no {sampler} sampler: "):
            exported(student, stage_one, tmp_path / "out")
