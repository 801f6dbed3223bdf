"""Stage 1: what the student equals at initialisation, and what the objective is minimised by."""

import pytest
import torch

from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.models import ClassifierFreeGuidance, GaussianMixture, GuidanceConditioned, guidance_student
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_batch, tiny_denoiser


class ExactStudent(torch.nn.Module):
    """The guided mixture as a function of w: what stage 1 should find."""

    w_range = (0.0, 4.0)

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x, sigma, cond=None, w=None):
        return ClassifierFreeGuidance(self.mixture, w)(x, sigma, cond)


def objective(teacher, student):
    return GuidanceDistillation(
        teacher,
        student,
        noise_levels=make_noise_levels("cosine"),
        weighting=make_weighting("truncated_snr"),
    )


def test_student_equals_the_conditional_teacher_at_initialisation():
    teacher = tiny_denoiser()
    student = guidance_student(teacher, (0.0, 4.0))
    batch = tiny_batch(teacher)
    sigma = torch.tensor([0.01, 1.3, 60.0]).double()
    for w in (0.0, 2.5, 4.0):
        assert torch.equal(
            GuidanceConditioned(student, w)(batch["x"], sigma, batch["y"]), teacher(batch["x"], sigma, batch["y"])
        )


def test_the_exactly_guided_student_has_zero_loss_and_another_has_not():
    mixture = GaussianMixture(
        weights=[0.5, 0.3, 0.2], means=torch.randn(3, 2, 5, 7), variances=[0.1, 0.2, 0.05], labels=[0, 1, 1]
    )
    batch = {"x": torch.randn(3, 2, 5, 7), "y": torch.tensor([0, 1, 1])}
    exact = objective(mixture, ExactStudent(mixture)).loss(batch, torch.Generator().manual_seed(0)).value
    assert exact.item() == 0

    class Unguided(ExactStudent):
        def forward(self, x, sigma, cond=None, w=None):
            return self.mixture(x, sigma, cond)

    wrong = objective(mixture, Unguided(mixture)).loss(batch, torch.Generator().manual_seed(0)).value
    assert wrong.item() > 1e-3


def test_the_loss_is_that_of_algorithm_1():
    mixture = GaussianMixture([0.6, 0.4], torch.randn(2, 2, 5, 7), [0.1, 0.2], labels=[0, 1])
    batch = {"x": torch.randn(3, 2, 5, 7), "y": torch.tensor([0, 1, 1])}

    class Zero(ExactStudent):
        def forward(self, x, sigma, cond=None, w=None):
            self.seen = x, sigma, w
            return torch.zeros_like(x)

    student = Zero(mixture)
    value = objective(mixture, student).loss(batch, torch.Generator().manual_seed(0)).value
    noisy, sigma, w = student.seen
    assert w.unique().numel() == 3 and w.min() >= 0 and w.max() <= 4
    noise = (noisy - batch["x"]) / sigma.view(-1, 1, 1, 1)
    assert 0.9 < noise.std() < 1.1
    conditional, unconditional = mixture(noisy, sigma, batch["y"]), mixture(noisy, sigma)
    target = conditional + w.view(-1, 1, 1, 1) * (conditional - unconditional)
    squares = target.double().square().flatten(1).mean(1)
    assert value.item() == pytest.approx(float(((sigma**-2).clamp(min=1) * squares).mean()), rel=1e-5)


def test_no_dropout_in_training():
    teacher = tiny_denoiser()
    assert not any(m.training for m in objective(teacher, guidance_student(teacher, (0.0, 4.0))).train().modules())


def test_w_reaches_the_student_after_one_update():
    teacher = tiny_denoiser()
    student = guidance_student(teacher, (0.0, 4.0))
    loss = objective(teacher, student).loss(tiny_batch(teacher), torch.Generator().manual_seed(0)).value
    loss.backward()
    assert student.model.map_w.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_for_a_single_w():
    teacher = tiny_denoiser()
    student = guidance_student(teacher, (1.5, 1.5))
    x, y = tiny_batch(teacher)["x"], tiny_batch(teacher)["y"]
    generator = torch.Generator().manual_seed(3)
    loss = objective(teacher, student).loss({"x": x, "y": y}, generator).value
    assert torch.isfinite(loss)


def test_a_student_without_w_is_refused():
    with pytest.raises(ValueError, match="guidance_student"):
        objective(tiny_denoiser(), tiny_denoiser())
