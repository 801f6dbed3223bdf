"""The shipped models of emoji: what they are, and that the students end where their teacher ends."""

import pytest
import torch

from diffdistill import load_denoiser
from diffdistill.data import load_data
from diffdistill.denoiser import spread_labels
from diffdistill.metrics import frechet_distance, gaussian_of, load_classifier, make_features
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan
from diffdistill.solvers import shipped_gaussians

NAMES = ["emoji-teacher", "emoji-guided", *(f"emoji-student-{n}" for n in (1, 2, 4))]


def drawn(name, count, *, w, **options):
    model = load_denoiser(name)
    labels = spread_labels(count, 9)
    return torch.cat(list(generate(plan(model, w=w, **options), range(count), labels))).clamp(-1, 1), labels


@pytest.fixture(scope="module")
def teacher():
    return drawn("emoji-teacher", 54, w=1.0, num_steps=16)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_of_emoji_are_of_one_kind(name):
    model = load_denoiser(name)
    assert (model.data_shape, model.num_classes) == ((3, 16, 16), 9)
    assert (model.w_range is None) == (name == "emoji-teacher")
    steps = 0 if model.distilled is None else len(model.distilled.sigmas) - 1
    assert steps == (int(name[-1]) if "student" in name else 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "emoji-teacher" in shipped_gaussians()


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_students_end_nearer_to_their_teacher_than_its_few_steps_do(teacher, steps):
    x, _ = drawn(f"emoji-student-{steps}", 54, w=1.0)
    few, _ = drawn("emoji-teacher", 54, w=1.0, num_steps=steps)
    error, plain = ((y - teacher[0]).square().mean().sqrt() for y in (x, few))
    assert error < 0.85 * plain
    # Another seed of the same class is far away.
    assert float(error) < 0.4 * float((teacher[0].roll(9, 0) - teacher[0]).square().mean().sqrt())


def test_most_guided_samples_are_of_the_class_asked_for(teacher):
    x, labels = teacher
    assert load_classifier(subject="emoji").accuracy(x, labels) > 0.5
    features = make_features("pixels_8x8")
    data = gaussian_of(features, load_data("emoji", resolution=16).tensors()["x"])
    noise = gaussian_of(features, torch.randn(54, 3, 16, 16).clamp(-1, 1))
    assert frechet_distance(gaussian_of(features, x), data) < 0.6 * frechet_distance(noise, data)
