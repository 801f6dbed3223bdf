"""The shipped latent models of shapes: 3x32x32 images as latents of 4x8x8."""

import pytest
import torch

from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.editing.pictures import known_of, right_half
from diffdistill.editing.session import TASKS, Edit, encoding_plan
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan


@pytest.fixture(scope="module")
def teacher():
    return load_denoiser("shapes-teacher")


@pytest.fixture(scope="module")
def student():
    return load_denoiser("shapes-student-4")


@pytest.fixture(scope="module")
def shapes():
    """24 held-out images and their classes."""
    items = load_data("shapes", size=24, seed=1).tensors()
    return items["x"], items["y"]


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


def test_the_autoencoder_reproduces_held_out_images(teacher, shapes):
    latents = teacher.codec.encode(shapes[0])
    assert latents.shape == (24, 4, 8, 8) and abs(float(latents.std()) - 1) < 0.1
    assert rmse(teacher.codec.decode(latents), shapes[0]) < 2 * 10 ** (-28 / 20)  # a PSNR of 28 dB


def test_the_student_follows_the_guided_teacher(teacher, student):
    """Seed by seed, in pixels: 4 evaluations against 128."""
    labels = torch.arange(20) % 10
    few = {"student": plan(student, w=1.0), "teacher": plan(teacher, w=1.0, num_steps=4)}
    (truth,) = generate(plan(teacher, w=1.0, num_steps=64), range(20), labels)
    found = {name: rmse(next(generate(planned, range(20), labels)), truth) for name, planned in few.items()}
    print(f"distance to the guided teacher of 64 steps: student {found['student']:.3f}, teacher {found['teacher']:.3f}")
    assert found["student"] < 0.7 * found["teacher"]


def test_inpainting_in_latents(student, shapes):
    images, labels = shapes
    known = known_of(right_half((32, 32)), (32, 32))[None]
    common = {"images": images, "plan": plan(student, w=1.0), "cond": labels, "codec": student.codec, "known": known}
    once, often = (TASKS["inpaint"](Edit(repeats=n, **common)) for n in (1, 5))
    assert torch.equal(often[..., :16], images[..., :16])
    errors = [rmse(made[..., 16:], images[..., 16:]) for made in (once, often)]
    print(f"error of the unknown half: {errors[0]:.3f} by one step at each level, {errors[1]:.3f} by five")
    assert errors[1] < 0.9 * errors[0]


def test_style_transfer_in_latents_keeps_colours_and_places(teacher, student, shapes):
    """All shapes become circles; what is by chance is what other circles share with them."""
    images, labels = shapes
    circles = torch.zeros_like(labels)
    made = TASKS["style_transfer"](
        Edit(
            images=images,
            plan=plan(student, w=3.0),
            cond=circles,
            codec=student.codec,
            strength=0.75,
            source=encoding_plan(teacher, num_steps=16, solver={"name": "heun"}),
            source_cond=labels,
        )
    )
    (others,) = generate(plan(student, w=3.0), range(24), circles)
    kept, chance = rmse(made, images), rmse(others, images)
    print(f"distance to the image before: {kept:.3f}, by chance {chance:.3f}")
    assert 0.02 < kept < 0.4 * chance
