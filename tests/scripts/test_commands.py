"""The command line: what works end to end on a tiny model, and what a user does wrong."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from diffdistill.denoiser import Distilled
from diffdistill.models import guidance_student, save_denoiser
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan
from tests.builders import tiny_denoiser
from tests.scripts.calling import ROOT, call, command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny teacher for digits, and a tiny student of two steps."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    save_denoiser(teacher, folder / "teacher.safetensors")
    student = guidance_student(teacher, (0.0, 4.0))
    student.distilled = Distilled((80.0, 1.0, 0.0))
    save_denoiser(student, folder / "student.safetensors")
    return folder


def test_both_stages_and_sampling_from_the_command_line(models, tmp_path):
    quick = ["trainer.updates=2", "trainer.batch_size=8", "preview.num_samples=4"]
    done = call("distill_guidance", f"teacher={models / 'teacher.safetensors'}", f"out={tmp_path / 'one'}", *quick)
    assert done.returncode == 0, done.stderr
    stage2 = [f"teacher={tmp_path / 'one'}", f"out={tmp_path / 'two'}", "start_steps=4", "stages=null", *quick]
    done = call("distill_steps", *stage2)
    assert done.returncode == 0, done.stderr
    again = call("distill_steps", *stage2)
    assert again.stdout == done.stdout
    options = [f"model={tmp_path / 'two/stages/002'}", "w=1", "num_samples=30", "save=npz", f"out={tmp_path / 'x'}"]
    done = call("sample", *options)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "x/samples.npz") as file:
        assert file["x"].shape == (30, 1, 8, 8) and file["x"].dtype == np.float32 and abs(file["x"]).max() <= 1
        assert np.bincount(file["y"]).tolist() == [3] * 10


def test_an_interrupted_run_of_sampling_continues_and_batches_do_not_matter(models, tmp_path):
    options = ["w=2", "num_samples=7", f"model={models / 'student.safetensors'}", "save=npz"]
    assert call("sample", *options, "batch_size=3", f"out={tmp_path / 'a'}").returncode == 0
    whole = np.load(tmp_path / "a/samples.npz")["x"]
    parts = sorted((tmp_path / "a/parts").iterdir())
    assert len(parts) == 3
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    (tmp_path / "a/samples.npz").unlink()
    assert call("sample", *options, "batch_size=3", f"out={tmp_path / 'a'}").returncode == 0
    assert np.array_equal(np.load(tmp_path / "a/samples.npz")["x"], whole)
    assert parts[0].stat().st_mtime_ns == kept
    assert call("sample", *options, "batch_size=7", f"out={tmp_path / 'b'}").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "b/samples.npz")["x"], whole, atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"data_shape": [3, 8, 8], "latents": True}])
def test_samples_of_latents_without_an_autoencoder_keep_their_range_and_become_no_picture(shape, tmp_path):
    """Latent diffusion and Stable Diffusion from their own files: latents have a standard deviation of 1."""
    denoiser = tiny_denoiser(preconditioning={"name": "edm", "sigma_data": 4.0}, **shape)
    save_denoiser(denoiser, tmp_path / "latent.safetensors")
    options = [f"model={tmp_path / 'latent.safetensors'}", "num_samples=3", "num_steps=4", f"out={tmp_path / 'x'}"]
    done = call("sample", *options)
    assert done.returncode == 2 and "are latents" in done.stderr and not (tmp_path / "x").exists()
    assert call("sample", *options, "save=npz").returncode == 0
    x = np.load(tmp_path / "x/samples.npz")["x"]
    (drawn,) = generate(plan(denoiser.eval(), num_steps=4), range(3), torch.tensor([0, 1, 2]))
    np.testing.assert_allclose(x, drawn, rtol=1e-4, atol=1e-4)
    assert np.abs(x).max() > 2


def test_statistics_and_sampling_from_an_analytic_start(models, tmp_path):
    model = tmp_path / "teacher.safetensors"
    shutil.copy(models / "teacher.safetensors", model)
    options = [f"model={model}", "num_steps=2", "num_samples=12", "save=npz", "solver=ipndm", "start=3.5"]
    options += ["schedule=polynomial", f"out={tmp_path / 'x'}"]
    done = call("sample", *options)
    assert done.returncode == 2 and "make them with diffdistill gaussian-stats" in done.stderr
    done = call("gaussian_stats", f"model={model}", "data.split=test", "beside=true", f"out={tmp_path / 's'}")
    assert done.returncode == 0 and "statistics of 355 images" in done.stdout, done.stderr
    assert (tmp_path / "teacher.statistics.safetensors").is_file()
    done = call("sample", *options)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "x/samples.npz") as file:
        assert file["x"].shape == (12, 1, 8, 8)
    done = call("evaluate", *options[:2], "num_samples=20", "splits=1", "start=3.5", "measures=[accuracy]")
    assert done.returncode == 0 and "class accuracy" in done.stdout, done.stderr


def test_a_mistake_is_one_line_and_exit_code_2():
    # In a process of its own; the others are in test_bad_input.py.
    done = subprocess.run(command("sample", "model=nope"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def test_a_folder_of_another_run_is_refused(models, tmp_path):
    options = [f"model={models / 'student.safetensors'}", "num_samples=2", f"out={tmp_path}/a"]
    assert call("sample", *options).returncode == 0
    done = call("sample", *options, "seed=5")
    assert done.returncode == 2 and "seed was 0 and is now 5" in done.stderr


def test_w_outside_the_trained_range_is_a_warning(models, tmp_path):
    with pytest.warns(UserWarning, match="guidance weight w = 9"):
        done = call("sample", f"model={models / 'student.safetensors'}", "w=9", "num_samples=2", f"out={tmp_path}/a")
    assert done.returncode == 0


def test_the_quickstart_end_to_end(models, tmp_path):
    updates = {"updates": 2, "batch_size": 8}
    tiny = [f"+stage{n}.trainer.{name}={value}" for n in (1, 2) for name, value in updates.items()]
    tiny += ["+stage2.start_steps=32", *(f"+stage2.stages.{n}.updates=2" for n in (16, 8, 4, 2, 1))]
    options = [f"teacher={models / 'teacher.safetensors'}", f"out={tmp_path}/q", "table.num_samples=70", *tiny]
    options += [f"table.rows.{row}.num_steps=4" for row in (0, 1)]
    done = call("quickstart", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| student")] == ["16", "8", "4", "2", "1"]
    assert str(tmp_path) in lines[-1]
    for name in ("quality.png", "samples_w0.png", "samples_w1.png", "samples_w3.png", "table/index.html"):
        assert (tmp_path / "q" / name).stat().st_size > 0
