"""Commands that are run again: the same is continued, and what has changed is never passed off as the same."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data.latents import LatentData
from diffdistill.models import build_autoencoder, guidance_student, save_autoencoder, save_denoiser
from tests.builders import tiny_denoiser
from tests.scripts.calling import call

QUICK = ["trainer.updates=2", "trainer.batch_size=8", "trainer.sample_every=null"]


def teacher(path, shift=0.0):
    denoiser = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    next(denoiser.parameters()).data.add_(shift)
    save_denoiser(denoiser, path)
    return path


def said(done, code=0):
    assert done.returncode == code, done.stderr
    return done.stderr


def drawn(out):
    with np.load(out / "samples.npz") as file:
        return file["x"]


def test_samples_are_those_of_the_model_and_the_settings(tmp_path):
    model, out = tmp_path / "m.safetensors", tmp_path / "x"
    save_denoiser(guidance_student(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), (0.0, 4.0)), model)
    options = [f"model={model}", f"out={out}", "num_steps=2", "save=npz", "batch_size=4", "num_samples=8", "w=1"]
    said(call("sample", *options))
    first = drawn(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    shutil.move(model, tmp_path / "moved.safetensors")
    options[0] = f"model={tmp_path / 'moved.safetensors'}"
    said(call("sample", *options, "num_samples=12"))  # an unchanged model goes on, wherever it lies
    assert np.array_equal(drawn(out)[:8], first) and len(drawn(out)) == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = guidance_student(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), (0.0, 4.0))
    torch.nn.init.normal_(other.model.map_w.weight, std=3.0)
    save_denoiser(other, tmp_path / "moved.safetensors")
    assert "moved.safetensors holds has changed" in said(call("sample", *options), 2)
    said(call("sample", *options, "accept_changes=true"))
    replaced = drawn(out)
    assert not np.array_equal(replaced, first)
    said(call("sample", *options, "w=3", "accept_changes=true"))
    weighted = drawn(out)
    said(call("sample", *options, "w=3", f"out={tmp_path / 'fresh'}"))
    assert np.array_equal(weighted, drawn(tmp_path / "fresh")) and not np.array_equal(weighted, replaced)


def test_samples_are_those_of_the_statistics_that_they_start_from(tmp_path):
    model, out = teacher(tmp_path / "t.safetensors"), tmp_path / "x"
    statistics = ["gaussian_stats", f"model={model}", "beside=true"]
    said(call(*statistics, "data.split=test", f"out={tmp_path / 's'}"))
    options = [f"model={model}", f"out={out}", "num_steps=2", "save=npz", "num_samples=3", "start=3.5"]
    said(call("sample", *options))
    said(call(*statistics, "data.split=train", f"out={tmp_path / 's2'}"))
    assert "statistics" in said(call("sample", *options), 2)


def test_a_stage_1_is_finished_for_its_teacher_alone(tmp_path):
    path = teacher(tmp_path / "t.safetensors")
    options = ["distill_guidance", f"teacher={path}", f"out={tmp_path / 'one'}", "preview.num_samples=4", *QUICK]
    said(call(*options))
    assert call(*options).stdout == f"the guidance-conditioned model is {tmp_path / 'one/model.safetensors'}\n"
    teacher(path, shift=1.0)
    assert "what teacher=" in said(call(*options), 2)
    assert "it is finished" in said(call(*options, "accept_changes=true"), 2)


@pytest.fixture
def images(tmp_path):
    place = tmp_path / "images" / "a"
    place.mkdir(parents=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def test_latents_are_those_of_the_images_and_the_autoencoder(images, tmp_path):
    made = {"latent_channels": 2, "channels": [4], "num_blocks": 1, "data_shape": [3, 8, 8]}
    codec, out = tmp_path / "codec.safetensors", tmp_path / "latents"
    save_autoencoder(build_autoencoder(made), codec)
    options = ["cache_latents", f"model={codec}", "data=images", f"data.root={images}", "data.resolution=null"]
    options += [f"out={out}", "shard_size=4", "batch_size=2"]
    said(call(*options))
    before = LatentData(out).tensors()["x"]
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.safetensors")}
    said(call(*options))
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("0*.safetensors")} == times
    Image.new("RGB", (8, 8), "red").save(images / "a/1.png")
    assert "(what data.root holds)" in said(call(*options), 2)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(images / "a/1.png")
    said(call(*options))
    torch.manual_seed(3)
    save_autoencoder(build_autoencoder(made), codec)
    assert "(what model holds)" in said(call(*options), 2)
    said(call(*options, f"out={tmp_path / 'anew'}"))
    assert not torch.equal(LatentData(tmp_path / "anew").tensors()["x"], before)
