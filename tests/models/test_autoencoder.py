"""The autoencoder, and latent denoisers that carry one."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffdistill import load_denoiser
from diffdistill.data import LatentData, Shapes, TensorData, load_data
from diffdistill.data.latents import cache_images
from diffdistill.denoiser import image_shape
from diffdistill.models import (
    Autoencoder,
    build_denoiser,
    guidance_student,
    guided,
    load_autoencoder,
    save_autoencoder,
    save_denoiser,
)
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.denoising import Denoising
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.reconstruction import Reconstruction
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_denoiser

SHAPE, LATENTS = (3, 16, 24), (2, 4, 6)
SMALL = {"latent_channels": 2, "channels": [8, 12]}


def autoencoder(shape=SHAPE):
    torch.manual_seed(3)
    made = Autoencoder(data_shape=shape, **SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def latent_denoiser(side=8):
    """A tiny denoiser of the latents of images of 4 times the side."""
    inner = autoencoder((3, 4 * side, 4 * side))
    config = tiny_denoiser().config
    return build_denoiser({**config, "provenance": None}, autoencoder=inner), inner


def test_shapes_and_scale():
    made, images = autoencoder(), torch.rand(20, *SHAPE) * 2 - 1
    assert made.factor == 4 and made.channels == 3 and made.latent_shape == LATENTS
    assert image_shape(LATENTS, made) == SHAPE and image_shape(LATENTS, None) == LATENTS
    made.fit_scale(images, batch_size=7)
    latents = made.encode(images)
    assert latents.shape == (20, *LATENTS)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.decode(latents), made.decoder(made.encoder(images)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="multiples of 4"):
        Autoencoder(data_shape=(3, 16, 26))


def test_the_loss_is_that_of_a_posterior_of_fixed_width():
    made, x = autoencoder(), torch.rand(3, *SHAPE) * 2 - 1
    z = made.encoder(x)
    exact = (made.decoder(z) - x).square().mean() + 0.3 * z.square().mean()
    found = Reconstruction(made, noise=0.0, prior=0.3).loss({"x": x}, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.value, exact)
    torch.testing.assert_close(found.logs["psnr"], 10 * torch.log10(4 / (made.decoder(z) - x).square().mean()))
    noisy = [Reconstruction(made, noise=s, prior=0.0) for s in (0.0, 0.3)]
    plain, blurred = (o.loss({"x": x}, torch.Generator().manual_seed(0)).value for o in noisy)
    assert (blurred - plain).abs() > 1e-4
    with pytest.raises(ValueError, match="noise.*-1"):
        Reconstruction(made, noise=-1.0)


def test_training_improves_the_reconstruction(tmp_path):
    torch.manual_seed(0)
    data = Shapes(size=64, resolution=16)
    made = Autoencoder(data_shape=data.shape, **SMALL)
    images = data.tensors()["x"]
    before = (made.decoder(made.encoder(images)) - images).square().mean()
    config = TrainerConfig(updates=40, batch_size=32, learning_rate=5e-3)
    trained = Trainer(Reconstruction(made), data, config, Run(tmp_path, {})).train()
    assert (trained.decoder(trained.encoder(images)) - images).square().mean() < before / 3


def test_both_halves_are_compiled():
    torch._dynamo.reset()
    counter, objective = CompileCounter(), Reconstruction(autoencoder())
    objective.compile_networks(counter)
    objective.loss({"x": torch.zeros(3, *SHAPE)}, torch.Generator().manual_seed(0))
    assert counter.frame_count >= 2  # PyTorch 2.6 compiles their layers apart


def test_files(tmp_path):
    made, images = autoencoder(), torch.rand(3, *SHAPE) * 2 - 1
    made.fit_scale(images)
    save_autoencoder(made, tmp_path / "run", provenance={"command": "python x.py"})
    again = load_autoencoder(tmp_path / "run")
    assert torch.equal(again.encode(images), made.encode(images)) and again.config == made.config
    assert again.config["provenance"] == {"command": "python x.py"}
    with pytest.raises(ValueError, match="an autoencoder, not a denoiser"):
        load_denoiser(tmp_path / "run")
    save_denoiser(tiny_denoiser(), tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="holds no autoencoder"):
        load_autoencoder(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="nowhere"):
        load_autoencoder(tmp_path / "nowhere")


def test_a_latent_denoiser_carries_its_autoencoder(tmp_path):
    denoiser, inner = latent_denoiser()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    latents = inner.encode(images)
    save_denoiser(denoiser, tmp_path / "m.safetensors")
    loaded = load_denoiser(tmp_path / "m.safetensors")
    student = guidance_student(loaded, (0.0, 4.0))
    for model in (denoiser, loaded, guided(loaded, 1.0), student, guided(student, 2.0)):
        assert model.codec.factor == 4
        torch.testing.assert_close(model.codec.encode(images), latents)
        torch.testing.assert_close(model.codec.decode(latents), inner.decode(latents))
    again = load_autoencoder(tmp_path / "m.safetensors")
    torch.testing.assert_close(again.encode(images), latents)
    assert tiny_denoiser().codec is None
    with pytest.raises(ValueError, match=r"\[2, 4, 6\].*\[2, 8, 8\]"):
        build_denoiser(tiny_denoiser().config, autoencoder=autoencoder())


def test_samples_of_a_latent_denoiser_are_images():
    denoiser, _ = latent_denoiser()
    planned = plan(denoiser, num_steps=2)
    (x,) = generate(planned, [5, 6, 7], torch.tensor([0, 1, 2]))
    assert x.shape == (3, 3, 32, 32)
    (alone,) = generate(planned, [6], torch.tensor([1]))
    torch.testing.assert_close(x[1:2], alone, rtol=1e-4, atol=1e-4)


def test_training_the_denoiser_leaves_the_autoencoder_alone(tmp_path):
    denoiser, _ = latent_denoiser()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    assert not any(name.startswith("autoencoder") for name, _ in denoiser.requires_grad_(True).named_parameters())
    data = TensorData(torch.rand(16, 2, 8, 8), torch.arange(16) % 4, num_classes=4)
    objective = Denoising(
        denoiser, noise_levels=make_noise_levels("lognormal"), weighting=make_weighting("edm", sigma_data=0.5)
    )
    config = TrainerConfig(updates=2, batch_size=8, ema_half_life=8, weight_decay=0.5, optimizer="adamw")
    trained = Trainer(objective, data, config, Run(tmp_path, {})).train()
    for name, value in trained.state_dict().items():
        buffer = name.startswith("autoencoder.") or name.endswith("resample_filter")
        assert torch.equal(value, before[name]) == buffer, name


def test_cached_latents(tmp_path):
    data, made = Shapes(size=25, resolution=32), autoencoder((3, 32, 32))
    origin = {"model": "here"}
    options = {"origin": origin, "shard_size": 10, "batch_size": 4, "dtype": "float32"}
    options["save_codec"] = partial(save_autoencoder, made)
    cache_images(made, data, tmp_path, **options)
    kept = (tmp_path / "000001.safetensors").stat().st_mtime_ns
    (tmp_path / "000002.safetensors").unlink()
    cache_images(made, data, tmp_path, **options)
    assert (tmp_path / "000001.safetensors").stat().st_mtime_ns == kept
    latents = load_data("latents", path=tmp_path)
    assert isinstance(latents, LatentData) and len(latents) == 25
    assert latents.shape == (2, 8, 8) and latents.num_classes == 10
    item, whole = latents[17], latents.tensors()
    torch.testing.assert_close(item["x"], made.encode(data[17]["x"][None])[0], rtol=1e-4, atol=1e-5)
    assert item["y"].dtype == torch.long and int(item["y"]) == 7
    assert torch.equal(whole["x"][17], item["x"]) and whole["y"].tolist() == [i % 10 for i in range(25)]
    assert torch.equal(
        load_autoencoder(latents.autoencoder).encode(data[3]["x"][None]), made.encode(data[3]["x"][None])
    )
    with pytest.raises(ValueError, match="another source"):
        cache_images(made, data, tmp_path, **{**options, "origin": {"model": "there"}})
