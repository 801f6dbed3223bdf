"""Editing with the shipped models of digits: what an edit must keep, and what it must change."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdistill import load_denoiser, sample
from diffdistill.data import load_data
from diffdistill.editing import Known, encode, image_to_image, inpaint, style_transfer
from diffdistill.editing.inputs import read_images, read_mask
from diffdistill.generation import plan
from diffdistill.models import guided
from diffdistill.pictures import save_grid
from diffdistill.solvers import make_schedule, make_solver, seeded_noise

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0}


@pytest.fixture(scope="module")
def teacher():
    return load_denoiser("digits-teacher")


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits")
    items = [data[i] for i in range(20)]
    return torch.stack([item["x"] for item in items]), torch.stack([item["y"] for item in items])


def test_encoding_and_decoding_reproduces_a_digit(teacher, digits):
    x0, labels = digits[0][:4], digits[1][:4]
    sigmas = make_schedule(num_steps=256, **SIGMAS)
    noise = encode(teacher, x0, sigmas=sigmas, cond=labels)
    again = sample(teacher, noise, solver=make_solver("euler"), sigmas=sigmas, cond=labels)
    psnr = 10 * torch.log10(4 / (again - x0).square().mean())
    print(f"PSNR of a 256-step code: {psnr:.1f} dB")
    assert psnr >= 35
    assert 0.5 < noise.std() < 1.5


def test_inpainting_with_a_student_keeps_the_known_half(digits):
    x0, labels = digits
    scheme = plan(load_denoiser("digits-student-4"), w=1.0)
    noise = seeded_noise(range(20), x0.shape[1:])
    known = Known(x0, read_mask(None, (8, 8)))
    made = inpaint(scheme.denoiser, known, noise, solver=scheme.solver, sigmas=scheme.sigmas, cond=labels)
    assert torch.equal(made[..., :4], x0[..., :4])
    assert (made[..., 4:] - x0[..., 4:]).abs().mean() > 0.05


def test_strength_goes_from_the_image_to_the_class(digits):
    from diffdistill.evaluation.classifier import load_classifier

    x0, labels = digits
    classifier, target = load_classifier(), (labels + 1) % 10
    scheme = plan(load_denoiser("digits-student-8"), w=1.0)
    noise = seeded_noise(range(20), x0.shape[1:])
    options = {"solver": scheme.solver, "sigmas": scheme.sigmas, "cond": target}
    weak, strong = (image_to_image(scheme.denoiser, x0, noise, strength=s, **options) for s in (0.0, 1.0))
    assert torch.equal(weak, x0)
    assert classifier.accuracy(strong, target) >= 0.9


def test_style_transfer_changes_the_class(teacher, digits):
    from diffdistill.evaluation.classifier import load_classifier

    x0, labels = digits
    target = (labels + 3) % 10
    moved = style_transfer(
        teacher,
        guided(teacher, 1.0),
        x0,
        sigmas=make_schedule(num_steps=32, **SIGMAS),
        solver=make_solver("heun"),
        source_cond=labels,
        target_cond=target,
    )
    accuracy = load_classifier().accuracy(moved.clamp(-1, 1), target)
    print(f"style transfer: {accuracy:.2f} in the new class")
    assert accuracy >= 0.9
    centred = [v - v.mean(0) for v in (x0.flatten(1), moved.flatten(1))]
    own = torch.nn.functional.cosine_similarity(*centred).mean()
    print(f"similarity to the own image {own:.2f}")


def run(*overrides):
    command = [sys.executable, str(ROOT / "scripts/edit.py"), *map(str, overrides)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "options",
    [
        ["task=inpaint", "model=digits-student-4", "num_steps=null"],
        ["task=style_transfer", "label=7", "num_steps=8", "encoder.num_steps=8"],
    ],
    ids=["inpaint", "style_transfer"],
)
def test_the_command_line(options, tmp_path):
    done = run(*options, "num_images=3", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).stat().st_size > 500


def test_bad_pictures(tmp_path):
    save_grid(torch.zeros(1, 1, 9, 8), tmp_path / "tall.png", scale=1)
    with pytest.raises(ValueError, match="8x9.*8x8"):
        read_images(tmp_path / "tall.png", (1, 8, 8))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_images(tmp_path / "nowhere.png", (1, 8, 8))
    save_grid(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), tmp_path / "mask.png", scale=1)
    mask = read_mask(tmp_path / "mask.png", (8, 8))
    assert mask.shape == (1, 1, 8, 8) and mask[0, 0, 0, 0] == 1 and mask[0, 0, 7, 7] == 0
    done = run("task=colourise", f"out={tmp_path}")
    assert done.returncode == 2 and "style_transfer" in done.stderr
    done = run("task=inpaint", f"images={tmp_path / 'tall.png'}", f"out={tmp_path}")
    assert done.returncode == 2 and "8x9" in done.stderr
