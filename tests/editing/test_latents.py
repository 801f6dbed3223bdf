"""scripts/edit.py on latent models: a tiny one of ours, and Stable Diffusion from tiny real components."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdistill.denoiser import Distilled
from diffdistill.editing.pictures import known_of, read_masks, read_pictures
from diffdistill.editing.session import TASKS, Edit, encoding_plan
from diffdistill.models import Autoencoder, build_denoiser, save_denoiser
from diffdistill.reports.pictures import save_grid
from diffdistill.sampling.plans import plan
from tests.builders import tiny_denoiser

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import edit  # noqa: E402
from common.configs import compose, plain  # noqa: E402


def edited(*overrides):
    """Images before and after, as the command line makes them."""
    rows = edit.edit(plain(compose("edit", [str(o) for o in overrides]))).rows
    return rows["before"], rows["after"]


def pictures(folder, side, count=2):
    """A folder of pictures, and one of them as the mask of what is to be made: white in the middle."""
    torch.manual_seed(1)
    for i in range(count):
        save_grid(torch.rand(1, 3, side, side) * 2 - 1, folder / "images" / f"{i}.png", scale=1)
    mask = torch.full((1, 1, side, side), -1.0)
    mask[..., 4:10, 5:12] = 1
    save_grid(mask, folder / "mask.png", scale=1)
    found, size = read_pictures(folder / "images"), (side, side)
    known = [known_of(mask, size) for mask in read_masks(folder / "mask.png", found, size)]
    return torch.stack([picture.fitted(size) for picture in found]), known[0][None].bool()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A tiny latent denoiser of shapes, in a file."""
    folder = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    config = tiny_denoiser(num_classes=10).config
    autoencoder = Autoencoder(data_shape=(3, 32, 32), latent_channels=2, channels=[8, 12])
    model = build_denoiser(config, autoencoder=autoencoder)
    save_denoiser(model, folder / "model.safetensors")
    return folder, model


def test_our_latent_model_edits_shapes(ours):
    folder, model = ours
    options = [f"model={folder}", "data=shapes", "num_images=3", "num_steps=4"]
    before, same = edited(*options, "task=image_to_image", "strength=0")
    assert before.shape == (3, 3, 32, 32)
    torch.testing.assert_close(same, model.codec.decode(model.codec.encode(before)), rtol=1e-4, atol=1e-5)
    before, made = edited(*options, "task=inpaint", "label=[2,5]")
    assert torch.equal(made[..., :16], before[..., :16]) and (made[..., 16:] - before[..., 16:]).abs().max() > 1e-3
    _, moved = edited(*options, "task=style_transfer", "label=4", "encoder.num_steps=4")
    _, kept = edited(*options, "task=style_transfer", "label=4", "encoder.num_steps=4", "strength=0.1")
    torch.testing.assert_close(kept, same, rtol=1e-4, atol=1e-5)
    assert moved.shape == (3, 3, 32, 32) and (moved - same).abs().max() > 10 * (kept - same).abs().max()


def test_bad_input_of_our_latent_model(ours, tmp_path):
    folder, _ = ours
    options = [f"model={folder}", "num_steps=2"]
    pictures(tmp_path, 16)
    with pytest.raises(ValueError, match=r"\[3, 32, 32\].*\[1, 8, 8\].*data="):
        edited(*options)
    with pytest.raises(ValueError, match="not conditioned on text"):
        edited(*options, "data=shapes", "num_images=2", "prompt=a cat")
    for count in (0, 10**9):
        with pytest.raises(ValueError, match=f"num_images={count}"):
            edited(*options, "data=shapes", f"num_images={count}")
    with pytest.raises(ValueError, match="label 11"):
        edited(*options, "data=shapes", "num_images=2", "label=11")


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_distilled_encoder_hands_over_at_one_of_its_levels(strength):
    """Encoder and sampler on the same levels invert each other up to the error of Euler steps, at any strength."""
    teacher = tiny_denoiser()
    levels = (80.0, 2.0, 1.0, 0.4)
    encoder, sampler = (tiny_denoiser() for _ in range(2))
    encoder.distilled = Distilled((*levels, 0.002), "encoder")
    sampler.distilled = Distilled((*levels, 0.0))
    images, cond = torch.rand(3, 2, 8, 8) * 2 - 1, torch.tensor([0, 1, 2])
    source = encoding_plan(encoder)
    assert source.sigmas.tolist() == [*levels, 0.002]
    options = {"images": images, "cond": cond, "source_cond": cond, "strength": strength}
    made = TASKS["style_transfer"](Edit(plan=plan(sampler), source=source, **options))
    first = {0.5: 2, 1.0: 0}[strength]
    x, grid = images, [0.002, *reversed(levels[first:])]
    with torch.no_grad():
        for a, b in [*zip(grid, grid[1:], strict=False), *zip(grid[:0:-1], [*grid[-2:0:-1], 0.0], strict=True)]:
            x = x + (b - a) / a * (x - teacher(x, torch.full((3,), a), cond))
    torch.testing.assert_close(made, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    elsewhere = plan(teacher, num_steps=4, schedule={"name": "cosine", "sigma_min": 0.0, "sigma_max": 70.0})
    with pytest.raises(ValueError, match="80, 2, 1, 0.4"):
        TASKS["style_transfer"](Edit(plan=elsewhere, source=source, **options))
    with pytest.raises(ValueError, match="cannot encode"):
        encoding_plan(sampler)
    with pytest.raises(ValueError, match="images to noise"):
        plan(encoder)


diffusers = pytest.importorskip("diffusers")

from diffdistill.interop.diffusers import load_pipeline  # noqa: E402
from tests.interop.diffusers.builders import pipeline, unet  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stable Diffusion without and with mask channels."""
    home = tmp_path_factory.mktemp("pipelines")
    pipeline().save_pretrained(home / "plain")
    pipeline("StableDiffusionInpaintPipeline", network=unet(in_channels=9)).save_pretrained(home / "masked")
    return home


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_inpainting_by_stable_diffusion(folders, kind, tmp_path):
    images, known = pictures(tmp_path, 16)
    options = [
        "task=inpaint",
        f"model={folders / kind}",
        "prompt=a cat",
        "num_steps=2",
        f"images={tmp_path / 'images'}",
    ]
    before, made = edited(*options, f"mask={tmp_path / 'mask.png'}")
    torch.testing.assert_close(before, images)
    assert torch.equal(torch.where(known, made, images), images)
    assert ((made - images).abs().amax(1, keepdim=True)[~known.expand(2, 1, 16, 16)] > 1e-3).all()


def test_image_to_image_by_stable_diffusion(folders, tmp_path):
    images, _ = pictures(tmp_path, 16)
    options = [f"model={folders / 'plain'}", "prompt=a cat", "num_steps=2", f"images={tmp_path / 'images'}"]
    _, same = edited(*options, "task=image_to_image", "strength=0")
    codec = load_pipeline(folders / "plain").codec
    torch.testing.assert_close(same, codec.decode(codec.encode(images)), rtol=1e-4, atol=1e-5)
    _, made = edited(*options, "task=image_to_image", "strength=1")
    assert (made - same).abs().max() > 1e-2


def test_bad_input_of_stable_diffusion(folders, tmp_path):
    options = [f"model={folders / 'masked'}", "num_steps=2"]
    pictures(tmp_path / "large", 32)
    pictures(tmp_path, 16)
    with pytest.raises(ValueError, match="prompt="):
        edited(*options, f"images={tmp_path / 'images'}")
    for task in ("image_to_image", "style_transfer"):
        with pytest.raises(ValueError, match="misses 'channels'"):
            edited(*options, "prompt=a cat", f"task={task}", f"images={tmp_path / 'images'}")
    with pytest.raises(ValueError, match="no label"):
        edited(*options, "prompt=a cat", "label=1", f"images={tmp_path / 'images'}")
    options.append("prompt=a cat")
    with pytest.raises(ValueError, match="32x32.*16x16"):
        edited(*options, f"images={tmp_path / 'images'}", f"mask={tmp_path / 'large/mask.png'}")
    with pytest.raises(ValueError, match=r"\[3, 16, 16\].*\[1, 8, 8\]"):
        edited(*options)


def test_an_editor_is_loaded_from_foreign_files_too(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"no checkpoint")
    code = f"from diffdistill.editing.inputs import load_editor; load_editor({str(tmp_path / 'model.ckpt')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ForeignFileError" in done.stderr
