"""The command line: what works end to end on a tiny model, and what a user does wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdistill.denoiser import Distilled
from diffdistill.models import guidance_student, save_denoiser
from tests.builders import tiny_denoiser

ROOT = Path(__file__).resolve().parents[2]


def run(script, *overrides):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, overrides)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny teacher for digits, and a tiny student of two steps."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    save_denoiser(teacher, folder / "teacher.safetensors")
    student = guidance_student(teacher, (0.0, 4.0))
    student.distilled = Distilled((80.0, 1.0, 0.0))
    save_denoiser(student, folder / "student.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:-100])
    return folder


def test_both_stages_and_sampling_from_the_command_line(models, tmp_path):
    quick = ["trainer.updates=2", "trainer.batch_size=8", "preview.num_samples=4"]
    done = run("distill_guidance", f"teacher={models / 'teacher.safetensors'}", f"out={tmp_path / 'one'}", *quick)
    assert done.returncode == 0, done.stderr
    stage2 = [f"teacher={tmp_path / 'one'}", f"out={tmp_path / 'two'}", "start_steps=4", "stages=null", *quick]
    done = run("distill_steps", *stage2)
    assert done.returncode == 0, done.stderr
    again = run("distill_steps", *stage2)
    assert again.stdout == done.stdout
    options = [f"model={tmp_path / 'two/stages/002'}", "w=1", "num_samples=30", "save=npz", f"out={tmp_path / 'x'}"]
    done = run("sample", *options)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "x/samples.npz") as file:
        assert file["x"].shape == (30, 1, 8, 8) and file["x"].dtype == np.float32 and abs(file["x"]).max() <= 1
        assert np.bincount(file["y"]).tolist() == [3] * 10


def test_an_interrupted_run_of_sampling_continues_and_batches_do_not_matter(models, tmp_path):
    options = ["w=2", "num_samples=7", f"model={models / 'student.safetensors'}", "save=npz"]
    assert run("sample", *options, "batch_size=3", f"out={tmp_path / 'a'}").returncode == 0
    whole = np.load(tmp_path / "a/samples.npz")["x"]
    parts = sorted((tmp_path / "a/parts").iterdir())
    assert len(parts) == 3
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    (tmp_path / "a/samples.npz").unlink()
    assert run("sample", *options, "batch_size=3", f"out={tmp_path / 'a'}").returncode == 0
    assert np.array_equal(np.load(tmp_path / "a/samples.npz")["x"], whole)
    assert parts[0].stat().st_mtime_ns == kept
    assert run("sample", *options, "batch_size=7", f"out={tmp_path / 'b'}").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "b/samples.npz")["x"], whole, atol=1e-5)


BAD = {
    "preset": ("train_teacher", ["experiment=nope"], ["nope", "digits/teacher"]),
    "setting": ("train_teacher", ["trainer.updates=-3"], ["updates", "-3", "positive"]),
    "unknown setting": ("train_teacher", ["trainr.updates=3"], ["trainr"]),
    "data": ("train_teacher", ["data=nope"], ["nope", "cifar10"]),
    "missing folder": ("train_teacher", ["experiment=none", "data=images", "data.root=/nowhere"], ["/nowhere"]),
    "weighting": ("distill_guidance", ["teacher=TEACHER", "weighting=nope"], ["nope", "truncated_snr"]),
    "data of another shape": (
        "distill_guidance",
        ["experiment=none", "teacher=TEACHER", "data=shapes"],
        ["[3, 32, 32]", "[1, 8, 8]"],
    ),
    "start_steps": ("distill_steps", ["teacher=STUDENT", "start_steps=12"], ["12", "power of two"]),
    "sampler": ("distill_steps", ["teacher=STUDENT", "sampler=nope"], ["nope", "stochastic"]),
    "stage": (
        "distill_steps",
        ["teacher=STUDENT", "start_steps=8", "experiment=none", "trainer.batch_size=8", "+stages.5.updates=3"],
        ["5", "4, 2, 1"],
    ),
    "model": ("sample", ["model=nope"], ["nope"]),
    "truncated model": ("sample", ["model=TRUNCATED"], ["truncated.safetensors"]),
    "num_steps of a student": ("sample", ["model=STUDENT", "num_steps=3"], ["3", "2 steps"]),
    "no num_steps": ("sample", ["model=TEACHER"], ["num_steps"]),
    "solver of a student": ("sample", ["model=STUDENT", "solver=heun"], ["solver"]),
    "class label": ("sample", ["model=STUDENT", "labels=[12]"], ["12", "0 to 9"]),
    "solver": ("sample", ["model=TEACHER", "solver=nope"], ["nope", "heun"]),
    "solver option": ("sample", ["model=TEACHER", "num_steps=4", "solver=dpmpp", "solver.order=7"], ["7"]),
    "output": ("sample", ["model=STUDENT", "save=gif"], ["gif", "npz"]),
    "device": ("sample", ["model=STUDENT", "device=tpu9"], ["tpu9"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, models, tmp_path):
    script, overrides, expected = BAD[case]
    names = {"TEACHER": "teacher", "STUDENT": "student", "TRUNCATED": "truncated"}
    for name, file in names.items():
        overrides = [o.replace(f"={name}", f"={models / file}.safetensors") for o in overrides]
    done = run(script, *overrides, f"out={tmp_path / 'out'}")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for text in expected:
        assert text in lines[0]
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "config.yaml"]
    assert not written


def test_a_folder_of_another_run_is_refused(models, tmp_path):
    options = [f"model={models / 'student.safetensors'}", "num_samples=2", f"out={tmp_path}/a"]
    assert run("sample", *options).returncode == 0
    done = run("sample", *options, "seed=5")
    assert done.returncode == 2 and "seed was 0 and is now 5" in done.stderr


def test_w_outside_the_trained_range_is_a_warning(models, tmp_path):
    done = run("sample", f"model={models / 'student.safetensors'}", "w=9", "num_samples=2", f"out={tmp_path}/a")
    assert done.returncode == 0 and "warning: guidance weight w = 9" in done.stderr
