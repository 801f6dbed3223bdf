"""Guidance students of every family: those with an input for w of their own, and those that are given one."""

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.interop.diffusers import Parts, from_network, from_pipeline
from diffdistill.interop.diffusers.export import export_student
from diffdistill.models import guidance_student, guided, save_denoiser
from diffdistill.training.sharding import recompute
from tests.interop.diffusers.builders import (
    diffusers,
    dit,
    filled,
    flux,
    pooled_text,
    scheduler,
    sd3,
    sdxl_unet,
    text_batch,
    unet,
    unet_2d,
    vae,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import cache_latents
from common.configs import compose, plain

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
NULL = {"encoder_hidden_states": torch.zeros(5, 10), "pooled_projections": torch.zeros(6)}
SDXL = {
    "encoder_hidden_states": torch.ones(3, 7, 22),
    "text_embeds": torch.ones(3, 10),
    "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(3, 6),
}
FAMILIES = {
    "UNet2DModel": lambda: (from_network(filled(unet_2d()), scheduler(), null_class=3), torch.tensor([0, 2, -1])),
    "UNet2DConditionModel": lambda: (from_network(unet(), scheduler()), text_batch()),
    "SDXL": lambda: (from_network(sdxl_unet(), scheduler()), SDXL),
    "DiT": lambda: (from_network(filled(dit()), scheduler()), torch.tensor([0, 4, -1])),
    "SD3": lambda: (from_network(filled(sd3()), FLOW(), null=NULL), pooled_text()),
    "FLUX": lambda: (from_network(filled(flux(guidance_embeds=False)), FLOW(), null=NULL), pooled_text()),
}


def inputs(denoiser):
    shape = (4, 6, 8) if denoiser.data_shape[-1] == 128 else denoiser.data_shape
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, *shape, generator=generator), torch.tensor([0.3, 2.0, 11.0]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_student_ignores_w_and_a_trained_one_does_not(family, tmp_path):
    denoiser, cond = FAMILIES[family]()
    x, sigma = inputs(denoiser)
    student = guidance_student(denoiser, (2.0, 14.0))
    w = torch.tensor([2.0, 7.5, 14.0])
    with torch.no_grad():
        expected = denoiser(x, sigma, cond)
        torch.testing.assert_close(guided(student, w)(x, sigma, cond), expected, rtol=1e-4, atol=1e-5)
    for name in student.model.w_parameters:
        torch.nn.init.normal_(student.get_parameter(f"model.{name}"), std=0.3)
    error = (guided(student, w)(x, sigma, cond) - expected).square().sum()
    error.backward()
    for name in student.model.w_parameters:
        assert student.get_parameter(f"model.{name}").grad.abs().max() > 0
    copied = copy.deepcopy(student)  # which an evaluation with gradients must leave possible
    save_denoiser(student, tmp_path / "student.safetensors")
    loaded = load_denoiser(tmp_path / "student.safetensors")
    with torch.no_grad():
        answer = guided(student, w)(x, sigma, cond)
        assert (answer - expected).abs().max() > 1e-3
        # Each sample has a w of its own.
        for i in range(3):
            one = guided(student, float(w[i]))(x, sigma, cond)[i]
            torch.testing.assert_close(answer[i], one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guided(copied, w)(x, sigma, cond), answer)
        torch.testing.assert_close(guided(loaded, w)(x, sigma, cond), answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["DiT", "UNet2DConditionModel"])
def test_gradient_checkpointing_computes_the_same_gradients(family):
    denoiser, cond = FAMILIES[family]()
    x, sigma = inputs(denoiser)
    gradients = []
    for again in (False, True):
        student = guidance_student(denoiser, (2.0, 14.0))
        torch.nn.init.constant_(student.get_parameter(f"model.{student.model.w_parameters[0]}"), 0.05)
        if again:
            recompute(student)
        guided(student, 5.0)(x, sigma, cond).square().sum().backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("family", ["UNet2DModel", "DiT", "SD3"])
def test_students_that_stock_pipelines_give_no_weight_are_not_exported(family, tmp_path):
    denoiser, _ = FAMILIES[family]()
    student = guidance_student(denoiser, (2.0, 14.0))
    with pytest.raises(ValueError, match="stock pipelines give no guidance weight"):
        export_student(student, Parts(denoiser, None, None, None), tmp_path / "out")


def test_a_pipeline_of_dit(tmp_path):
    """A model of classes on latents: a denoiser by its folder, and latents with labels for its presets."""
    pipe = diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler(), id2label={0: "cat", 4: "dog"})
    pipe.save_pretrained(tmp_path / "dit")
    parts, loaded = from_pipeline(pipe), load_denoiser(tmp_path / "dit")
    assert parts.prompts is None and parts.codec is not None and loaded.num_classes == 5
    x, sigma = inputs(loaded)
    labels = torch.tensor([0, 4, -1])
    with torch.no_grad():
        expected = guided(parts.denoiser, 2.0)(x, sigma, labels)
        torch.testing.assert_close(guided(loaded, 2.0)(x, sigma, labels), expected, rtol=1e-4, atol=1e-4)
    fast = ["batch_size=4", "shard_size=6", "device=cpu", "dtype=float32"]
    shapes = ["data=shapes", "data.resolution=16", "data.size=9"]
    where = [f"model={tmp_path / 'dit'}", f"out={tmp_path / 'latents'}"]
    cache_latents.cache(plain(compose("cache_latents", [*where, *shapes, *fast])))
    data, images = load_data("latents", path=tmp_path / "latents"), load_data("shapes", resolution=16, size=9)
    assert data.num_classes == images.num_classes and data.shape == loaded.data_shape and len(data) == 9
    for i in (0, 8):
        torch.testing.assert_close(data[i]["x"], parts.codec.encode(images[i]["x"][None])[0], rtol=1e-4, atol=1e-5)
        assert data[i]["y"] == images[i]["y"] and data[i]["y"].dtype == torch.long
