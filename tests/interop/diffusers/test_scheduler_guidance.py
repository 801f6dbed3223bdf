"""Guidance by noise level in the stock pipelines whose network takes w."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill.interop.diffusers import from_pipeline, guidance_by_level, scheduler_for
from diffdistill.solvers import cfg_plus_plus, guidance_interval
from tests.interop.diffusers.builders import filled, flux_pipeline, pipeline, scheduler
from tests.interop.diffusers.stock import PROMPTS, close, student_of


@pytest.fixture(scope="module", params=["Stable Diffusion", "FLUX"])
def run(request):
    """A pipeline, and what makes latents of it at a guidance scale."""
    if request.param == "FLUX":
        pipe, size = flux_pipeline(), {"height": 16, "width": 16}
        filled(pipe.transformer.time_text_embed)
    else:
        student = student_of(from_pipeline(pipeline()))
        spaced = scheduler(timestep_spacing="trailing", clip_sample=False)
        pipe, size = pipeline(network=student.model.module, schedule=spaced), {}
    pipe.scheduler = scheduler_for(pipe)

    def draw(guidance_scale):
        draws = {"generator": torch.Generator().manual_seed(1), "num_inference_steps": 4, "output_type": "latent"}
        return pipe(PROMPTS, guidance_scale=guidance_scale, **draws, **size).images

    return pipe, draw


def test_weights_of_every_level(run):
    pipe, draw = run
    expected = draw(4.0)
    assert not torch.allclose(expected, draw(1.0), rtol=1e-2)
    with guidance_by_level(pipe, guidance_interval(w=3.0)):
        close(draw(1.0), expected)
    seen = []
    levels = pipe.scheduler.noise_levels
    with guidance_by_level(pipe, lambda sigma: seen.append(sigma) or 0.0):
        close(draw(9.0), draw(1.0))
    torch.testing.assert_close(torch.tensor(seen[:4]).double(), levels[:4], rtol=1e-4, atol=0)
    with guidance_by_level(pipe, cfg_plus_plus(scale=0.6, sigmas=levels)):
        assert torch.isfinite(draw(1.0)).all()
    close(draw(4.0), expected)


def test_networks_that_take_no_weight():
    with pytest.raises(ValueError, match="network of StableDiffusionPipeline takes no guidance weight"):
        guidance_by_level(pipeline(), guidance_interval(w=1.0)).__enter__()
