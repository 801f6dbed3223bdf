"""Editing with the shipped models of digits: what an edit must keep, and what it must change."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdistill import load_denoiser, sample
from diffdistill.data import load_data
from diffdistill.editing import Known, encode, image_to_image, inpaint
from diffdistill.editing.pictures import known_of, right_half
from diffdistill.editing.session import TASKS, Edit, encoding_plan
from diffdistill.sampling.plans import plan
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


def psnr(a, b):
    """Of each pair of images, averaged."""
    return float((10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))).mean())


def test_encoding_and_decoding_reproduces_a_digit(teacher):
    """Held-out digits: by 256 Euler steps each way, and by 4 steps of the distilled encoder, then 256 steps back."""
    x, y = load_data("digits", split="test").tensors().values()
    x0, labels = x[:16], y[:16]
    sigmas, euler = make_schedule(num_steps=256, **SIGMAS), make_solver("euler")
    few = encoding_plan(load_denoiser("digits-encoder-4"))
    assert few.num_steps == 4
    codes = {
        "256 steps": encode(teacher, x0, sigmas=sigmas, cond=labels),
        "4 distilled": encode(few.denoiser, x0, sigmas=few.sigmas, cond=labels),
        "4 Euler": encode(teacher, x0, sigmas=few.sigmas, cond=labels),
    }
    everything = torch.cat([*codes.values()])
    again = sample(teacher, everything, solver=euler, sigmas=sigmas, cond=labels.repeat(3)).split(16)
    found = {name: psnr(images, x0) for name, images in zip(codes, again, strict=True)}
    print("PSNR of codes by", ", ".join(f"{name} {value:.1f} dB" for name, value in found.items()))
    assert found["256 steps"] >= 35
    assert found["4 distilled"] >= 35
    assert found["4 distilled"] >= found["4 Euler"] + 10
    assert 0.5 < codes["256 steps"].std() < 1.5


def test_inpainting_with_a_student_keeps_the_known_half(digits):
    x0, labels = digits
    planned = plan(load_denoiser("digits-student-4"), w=1.0)
    noise = seeded_noise(range(20), x0.shape[1:])
    known = Known(x0, known_of(right_half((8, 8)), (8, 8))[None])
    made = inpaint(planned.denoiser, known, noise, solver=planned.solver, sigmas=planned.sigmas, cond=labels)
    assert torch.equal(made[..., :4], x0[..., :4])
    assert (made[..., 4:] - x0[..., 4:]).abs().mean() > 0.05


def test_strength_goes_from_the_image_to_the_class(digits):
    from diffdistill.metrics.classifier import load_classifier

    x0, labels = digits
    classifier, target = load_classifier(), (labels + 1) % 10
    planned = plan(load_denoiser("digits-student-8"), w=1.0)
    noise = seeded_noise(range(20), x0.shape[1:])
    options = {"solver": planned.solver, "sigmas": planned.sigmas, "cond": target}
    weak, strong = (image_to_image(planned.denoiser, x0, noise, strength=s, **options) for s in (0.0, 1.0))
    assert torch.equal(weak, x0)
    assert classifier.accuracy(strong, target) >= 0.9


def blurred(x):
    """Ink of images, blurred and centred, as vectors `[N, 64]`."""
    kernel = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)[None, None]
    ink = torch.nn.functional.conv2d(x.clamp(-1, 1) + 1, kernel, padding=1).flatten(1)
    return ink - ink.mean(1, keepdim=True)


def moments(x):
    """Mass of the ink and its centre, `[N, 3]`."""
    ink, place = (x.clamp(-1, 1)[:, 0] + 1) / 2, torch.arange(8.0)
    mass = ink.sum((1, 2))
    return torch.stack([mass, (ink.sum(1) @ place) / mass, (ink.sum(2) @ place) / mass], dim=1)


def alike(a, b):
    """Mean correlation of two sets of images, pair by pair, and how mass and centre of the ink correlate over pairs."""
    pixels = torch.nn.functional.cosine_similarity(blurred(a), blurred(b)).mean()
    return pixels, torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(moments(a).T, moments(b).T, strict=True)]
    )


@pytest.fixture(scope="module")
def transfers(teacher):
    """60 held-out digits, the classes that they shall have, and real digits of those classes."""
    x, y = load_data("digits", split="test").tensors().values()
    x0, labels = x[:60], y[:60]
    target = (labels + 1 + torch.arange(60) % 9) % 10
    real, classes = load_data("digits", split="train").tensors().values()
    others = torch.stack([real[classes == c][i] for i, c in enumerate(target.tolist())])
    source = encoding_plan(teacher, num_steps=32, solver={"name": "heun"})
    common = {"images": x0, "cond": target, "source_cond": labels, "source": source}
    return common, others


@pytest.mark.parametrize("model", ["digits-teacher", "digits-student-4"])
def test_style_transfer_changes_the_class_and_keeps_the_layout(transfers, model):
    """With the defaults of scripts/edit.py; what is by chance is what other digits of the new class share with them."""
    from diffdistill.metrics.classifier import load_classifier

    common, others = transfers
    x0, target = common["images"], common["cond"]
    planned = plan(load_denoiser(model), w=2.0, num_steps=16 if model == "digits-teacher" else None)
    half, whole = (TASKS["style_transfer"](Edit(plan=planned, strength=s, **common)) for s in (0.6, 1.0))
    accuracy = load_classifier().accuracy(half.clamp(-1, 1), target)
    (pixels, ink), (far, _), (chance, chance_ink) = (alike(x0, made) for made in (half, whole, others))
    print(f"{model}: {accuracy:.2f} in the new class; correlation {pixels:.2f} at strength 0.6, {far:.2f} at 1,")
    print(f"{chance:.2f} by chance; of mass and centre of the ink {ink.tolist()}, by chance {chance_ink.tolist()}")
    assert accuracy >= 0.9
    assert pixels > chance + 0.1 and pixels > far + 0.05
    assert (ink > chance_ink + 0.2).all()


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


def test_a_mistake_of_an_edit_is_one_line(tmp_path):
    done = run("task=colourise", f"out={tmp_path}")
    assert done.returncode == 2 and "style_transfer" in done.stderr
