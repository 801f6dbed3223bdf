"""Networks of diffusers as denoisers: their own formulas, conditions, guidance, and whole pipelines."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffdistill import load_denoiser, sample
from diffdistill.interop.diffusers import from_network, from_pipeline, guidance_scale_embedding
from diffdistill.interop.diffusers.levels import sigma_table
from diffdistill.models import ClassifierFreeGuidance, guidance_student, guided, save_denoiser
from diffdistill.solvers import FeatureTap, make_solver
from tests.interop.diffusers import builders
from tests.interop.diffusers.builders import (
    diffusers,
    dit,
    flux,
    flux_pipeline,
    pipeline,
    pooled_text,
    scheduler,
    sd3,
    sd3_pipeline,
    sdxl_pipeline,
    sdxl_unet,
    text_batch,
    unet,
    unet_2d,
)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_unet_denoises_as_its_scheduler_says(prediction):
    """At table levels x0 is what DDIM calls the predicted original sample."""
    stock = scheduler(prediction_type=prediction, clip_sample=False)
    stock.set_timesteps(10)
    network, cond = unet(), text_batch()
    denoiser = from_network(network, stock)
    t = stock.timesteps[3]
    z = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        output = network(z, t, **cond).sample
        expected = stock.step(output, t, z).pred_original_sample
        sigma = sigma_table(stock)[t].expand(3)
        x = z * (1 + sigma[0] ** 2).sqrt().float()
        torch.testing.assert_close(denoiser(x, sigma, cond), expected, rtol=1e-4, atol=1e-5)
    assert denoiser.data_shape == (4, 8, 8) and denoiser.bottleneck is network.mid_block
    assert denoiser.sigma_max == pytest.approx(14.6146, abs=1e-3)


def test_timesteps_are_continuous_and_gradients_reach_sigma():
    denoiser, cond = from_network(unet(), scheduler()), text_batch()
    sigma = torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    denoiser(torch.randn(3, 4, 8, 8), sigma, cond).sum().backward()
    assert sigma.grad.abs().min() > 0


def test_guidance_is_composition():
    # In double precision, since w = 7 makes the rounding of a larger batch 15 times as large.
    null = {"encoder_hidden_states": torch.randn(7, 12).double()}
    cond = {name: value.double() for name, value in text_batch().items()}
    denoiser = from_network(unet().double(), scheduler(), null=null)
    x, sigma, w = (
        torch.randn(3, 4, 8, 8).double(),
        torch.tensor([0.3, 2.0, 11.0]).double(),
        torch.tensor([0.0, 2.0, 7.0]),
    )
    with torch.no_grad():
        yes = denoiser(x, sigma, cond)
        no = denoiser(x, sigma, {"encoder_hidden_states": null["encoder_hidden_states"].expand(3, 7, 12)})
        expected = (1 + w).view(3, 1, 1, 1) * yes - w.view(3, 1, 1, 1) * no
        torch.testing.assert_close(ClassifierFreeGuidance(denoiser, w)(x, sigma, cond), expected)
        torch.testing.assert_close(denoiser(x, sigma), no)
    assert (yes - no).abs().max() > 1e-3


def test_the_bottleneck_can_be_tapped():
    denoiser = from_network(unet(), scheduler(), null={"encoder_hidden_states": torch.randn(7, 12)})
    guided_denoiser = ClassifierFreeGuidance(denoiser, 2.0)
    with FeatureTap(guided_denoiser.bottleneck) as tap, torch.no_grad():
        guided_denoiser(torch.randn(3, 4, 8, 8), torch.ones(3).double(), text_batch())
        assert tap().shape == (6, 16, 4, 4)


@pytest.mark.parametrize("channels", [256, 7])
def test_the_guidance_embedding_is_the_stock_pipelines(channels):
    w = torch.tensor([0.0, 0.37, 2.0, 13.9])
    stock = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=channels)
    assert torch.equal(guidance_scale_embedding(w, channels), stock)


def test_a_network_that_takes_w():
    network = builders.filled(unet(w_channels=256))
    with pytest.raises(ValueError, match="convention"):
        from_network(network, scheduler())
    x, sigma, cond = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.0, 11.0]).double(), text_batch()
    denoiser = from_network(network, scheduler(), guidance_convention="w", w_range=(2, 14))
    scale = from_network(network, scheduler(), guidance_convention="scale", w_range=(2, 14))
    assert denoiser.w_range == (2, 14)
    with torch.no_grad():
        torch.testing.assert_close(guided(denoiser, 5.0)(x, sigma, cond), guided(scale, 4.0)(x, sigma, cond))
        assert (guided(denoiser, 5.0)(x, sigma, cond) - guided(denoiser, 4.0)(x, sigma, cond)).abs().max() > 1e-3


def test_sdxl_conditions():
    network = sdxl_unet()
    cond = {
        "encoder_hidden_states": torch.randn(3, 7, 22),
        "text_embeds": torch.randn(3, 10),
        "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(3, 6),
    }
    null = {"encoder_hidden_states": torch.zeros(7, 22), "text_embeds": torch.zeros(10)}
    denoiser, stock = from_network(network, scheduler(), null=null), scheduler()
    x, sigma = torch.randn(3, 4, 8, 8), sigma_table(stock)[[7, 99, 800]]
    denoiser.check_condition(cond, 3)
    with pytest.raises(ValueError, match="time_ids"):
        denoiser.check_condition({name: value for name, value in cond.items() if name != "time_ids"}, 3)
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    with torch.no_grad():
        z = x / (1 + sigma**2).sqrt().float().view(3, 1, 1, 1)
        output = network(z, torch.tensor([7.0, 99, 800]), cond["encoder_hidden_states"], added_cond_kwargs=added).sample
        expected = x - sigma.float().view(3, 1, 1, 1) * output
        torch.testing.assert_close(denoiser(x, sigma, cond), expected, rtol=1e-4, atol=1e-5)
        assert ClassifierFreeGuidance(denoiser, 3.0)(x, sigma, cond).shape == x.shape


def test_a_whole_sdxl_pipeline():
    parts = from_pipeline(sdxl_pipeline())
    cond = parts.prompts(["a cat", "b"])
    noise = torch.randn(2, 4, 8, 8)
    x = sample(
        guided(parts.denoiser, 2.0),
        noise,
        solver=make_solver("euler"),
        sigmas=torch.tensor([14.0, 2.0, 0.0]),
        cond=cond,
    )
    assert parts.codec.decode(x).shape == (2, 3, 16, 16)
    assert parts.denoiser.null_condition(cond)["encoder_hidden_states"].abs().max() == 0


def test_an_autoencoder_that_overflows_in_half_precision_computes_in_float32():
    """That of SDXL; stock pipelines do the same."""
    pipe = sdxl_pipeline().to(torch.float16)
    with torch.no_grad():
        for half in (pipe.vae.encoder, pipe.vae.decoder):
            half.conv_in.weight.mul_(60000)
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, 9 * torch.randn(2, 4, 8, 8)
    codec, single = from_pipeline(pipe).codec, copy.deepcopy(pipe.vae).float()
    with torch.no_grad():
        expected = single.config.scaling_factor * single.encode(images).latent_dist.mode()
        torch.testing.assert_close(codec.encode(images), expected)
        torch.testing.assert_close(codec.decode(latents), single.decode(latents / single.config.scaling_factor).sample)
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_sdxl_has_the_same_conditions_in_every_pipeline(task):
    pipe = sdxl_pipeline()
    sibling = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")(**pipe.components)
    expected = from_pipeline(pipe).prompts(["a cat", "b"])
    for name, value in from_pipeline(sibling).prompts(["a cat", "b"]).items():
        assert torch.equal(value, expected[name])


def test_unets_without_text():
    network = unet_2d()
    x, sigma, y = torch.randn(3, 3, 8, 4), torch.tensor([0.3, 2.0, 11.0]).double(), torch.tensor([0, 2, 1])
    stock = scheduler("DDPMScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    every = from_network(network, stock)
    assert every.num_classes == 4
    with pytest.raises(ValueError, match="null_class"):
        ClassifierFreeGuidance(every, 1.0)(x, sigma, y)
    denoiser = from_network(network, stock, null_class=3)
    assert denoiser.num_classes == 3 and denoiser.data_shape == (3, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, sigma, y), every(x, sigma, y))
        torch.testing.assert_close(denoiser(x, sigma, y * 0 - 1), every(x, sigma, y * 0 + 3))
        torch.testing.assert_close(denoiser(x, sigma), every(x, sigma, y * 0 + 3))
        assert (denoiser(x, sigma, y) - denoiser(x, sigma)).abs().max() > 1e-4


def test_dit_sd3_and_flux():
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.0, 11.0]).double()
    denoiser = from_network(dit(), scheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))
    assert denoiser.num_classes == 5 and denoiser.data_shape == (4, 8, 8)
    with torch.no_grad():
        assert ClassifierFreeGuidance(denoiser, 2.0)(x, sigma, torch.tensor([0, 4, -1])).shape == x.shape

    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    student = guidance_student(from_network(builders.filled(dit()), scheduler()), (0.0, 4.0)).train()
    labels, many = torch.arange(64) % 5, (torch.randn(64, 4, 8, 8), torch.ones(64).double())
    with torch.no_grad():
        # Blocks drop no labels by themselves in training.
        assert torch.equal(student(*many, labels), student.eval()(*many, labels))
    stable, cond = sd3(), pooled_text()
    t = sigma / (1 + sigma)
    with torch.no_grad():
        z = x / (1 + sigma).float().view(3, 1, 1, 1)
        velocity = stable(z, timestep=(1000 * t).float(), **cond).sample
        expected = z - t.float().view(3, 1, 1, 1) * velocity
        torch.testing.assert_close(from_network(stable, flow)(x, sigma, cond), expected, rtol=1e-4, atol=1e-5)

    network = flux()
    x = torch.randn(3, 4, 6, 8)
    z = x / (1 + sigma).float().view(3, 1, 1, 1)
    pipe = diffusers.FluxPipeline
    with torch.no_grad():
        velocity = network(
            pipe._pack_latents(z, 3, 4, 6, 8),
            timestep=t.float(),
            guidance=torch.full((3,), 3.5),
            img_ids=pipe._prepare_latent_image_ids(3, 3, 4, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3),
            **cond,
        ).sample
        velocity = pipe._unpack_latents(velocity, 48, 64, 8)
        expected = z - t.float().view(3, 1, 1, 1) * velocity
        denoiser = from_network(network, flow, w_range=(0.0, 6.0))
        torch.testing.assert_close(guided(denoiser, 2.5)(x, sigma, cond), expected, rtol=1e-4, atol=1e-5)


def velocity_loop(network, noise, times, cond, w=None):
    """The Euler steps of stock flow-matching pipelines, which start from noise alone."""
    z = noise
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            z = z + (t_next - t) * network(z, t, cond, w)
    return z


def test_a_whole_pipeline_of_sd3_guides_as_the_stock_one():
    pipe = sd3_pipeline()
    parts = from_pipeline(pipe)
    noise, cond = torch.randn(2, 4, 8, 8), parts.prompts(["a cat", "b"])
    latents = pipe(
        ["a cat", "b"], latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    ).images
    network, null = parts.denoiser.model, parts.denoiser.null_condition(cond)

    def guided_velocity(z, t, cond, w):
        yes, no = (network(z, 1000 * t.expand(2), text) for text in (cond, null))
        return no + 4.0 * (yes - no)

    expected = velocity_loop(guided_velocity, noise, pipe.scheduler.sigmas, cond)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_whole_pipeline_of_flux_takes_the_guidance_scale_itself():
    pipe = flux_pipeline()
    parts = from_pipeline(pipe, w_range=(0.0, 6.0))
    noise, cond = torch.randn(2, 4, 4, 6), parts.prompts(["a cat", "b"])
    pack = diffusers.FluxPipeline._pack_latents
    options = {"num_inference_steps": 2, "height": 8, "width": 12, "output_type": "latent"}
    latents = pipe(["a cat", "b"], latents=pack(noise, 2, 4, 4, 6), guidance_scale=4.0, **options).images
    network, w = parts.denoiser.model, torch.full((2,), 3.0)
    expected = velocity_loop(
        lambda z, t, *given: network(z, t.expand(2), *given), noise, pipe.scheduler.sigmas, cond, w
    )
    expected = pack(expected, 2, 4, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_pipeline_folder_is_a_denoiser_by_path(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    parts, loaded = from_pipeline(pipe), load_denoiser(tmp_path)
    x, sigma, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 11.0]).double(), parts.prompts(["a cat", "dog"])
    with torch.no_grad():
        expected = guided(parts.denoiser, 3.0)(x, sigma, cond)
        torch.testing.assert_close(guided(loaded, 3.0)(x, sigma, cond), expected, rtol=1e-4, atol=2e-4)
    assert parts.codec.decode(x).shape == (2, 3, 16, 16)
    assert parts.codec.encode(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 8, 8)
    with pytest.warns(UserWarning, match="cut"):
        parts.prompts(["a long prompt of many letters"])
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="diffusers folder"):
        load_denoiser(tmp_path)


def test_models_of_diffusers_are_saved_and_given_a_guidance_input_like_any_other(tmp_path):
    denoiser = from_pipeline(pipeline()).denoiser
    save_denoiser(denoiser, tmp_path / "model.safetensors")
    loaded = load_denoiser(tmp_path)
    x, sigma, cond = torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.0, 11.0]).double(), text_batch()
    student = guidance_student(denoiser, (2.0, 14.0))
    assert student.model.module.config.time_cond_proj_dim == 256
    with torch.no_grad():
        expected = denoiser(x, sigma, cond)
        torch.testing.assert_close(loaded(x, sigma, cond), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded(x, sigma), denoiser(x, sigma), rtol=1e-4, atol=1e-4)
        for w in (2.0, 14.0):
            assert torch.equal(guided(student, w)(x, sigma, cond), expected)


def test_bad_input():
    class Strange(diffusers.DDIMScheduler):
        pass

    stock = Strange(**builders.SD_BETAS)
    stock.register_to_config(prediction_type="epsilin")
    with pytest.raises(ValueError, match="'epsilin'.*flow_prediction"):
        from_network(unet(), stock)
    with pytest.raises(ValueError, match="timestep_type='continuous'"):
        from_network(unet(), scheduler("EulerDiscreteScheduler", timestep_type="continuous"))
    with pytest.raises(ValueError, match="24 input and 16 output channels"):
        from_network(flux(in_channels=24, out_channels=16), diffusers.FlowMatchEulerDiscreteScheduler())
    denoiser = from_network(unet(), scheduler())
    for cond, match in (
        ({"text": torch.zeros(3, 7, 12)}, "text"),
        (torch.zeros(3, dtype=torch.long), "dict"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 12)}, "2 samples"),
    ):
        with pytest.raises(ValueError, match=match):
            denoiser.check_condition(cond, 3)
    with pytest.raises(ValueError, match="empty prompt"):
        denoiser.null_condition(text_batch())


def test_pipelines_of_other_models_are_refused_by_name():
    components = {**sdxl_pipeline().components, "text_encoder": None, "tokenizer": None}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**components, requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="refiner"):
        from_pipeline(refiner)
    encoder = flux_pipeline().components
    network = builders.component(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=4, out_channels=8, num_layers=1
    )
    other = diffusers.PixArtSigmaPipeline(
        encoder["tokenizer_2"], encoder["text_encoder_2"], encoder["vae"], network, scheduler()
    )
    with pytest.raises(ValueError, match="'PixArtTransformer2DModel': choose one of DiT"):
        from_pipeline(other)
