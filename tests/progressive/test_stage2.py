"""Stage 2: the target, its exact minimiser, and the stochastic sampler."""

import gc
import math
import weakref

import pytest
import torch

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.editing import encode
from diffdistill.models import ClassifierFreeGuidance, GaussianMixture, GuidanceConditioned
from diffdistill.progressive.halving import Halving, halve_steps
from diffdistill.progressive.stage2 import (
    STEPS,
    StepDistillation,
    deterministic_steps,
    encoder_grid,
    encoder_steps,
    stochastic_steps,
)
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.progressive.targets import two_hop_target
from diffdistill.solvers import Interval, ProbabilityFlow, make_schedule, sample
from diffdistill.training import Run
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_batch, tiny_denoiser


def mixture(**options):
    return GaussianMixture(weights=[0.7, 0.3], means=torch.randn(2, 2, 5, 7), variances=[0.3, 0.1], **options)


class Guided(Denoiser):
    """The guided mixture as a function of w: what stage 1 should find."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.mixture = mixture(labels=[0, 1])

    def forward(self, x, sigma, cond=None, w=None):
        return ClassifierFreeGuidance(self.mixture, w)(x, sigma, cond)


class TwoSteps(Denoiser):
    """The student that equals its teacher's two steps exactly."""

    def __init__(self, teacher, steps):
        super().__init__()
        self.teacher, self.steps, self.num_classes = teacher, steps, teacher.num_classes

    def forward(self, x, sigma, cond=None, w=None):
        teacher = self.teacher if w is None else GuidanceConditioned(self.teacher, w)
        index = (self.steps[:, 0] - sigma[:, None]).abs().argmin(1)
        begin, mid, end = self.steps[index].unbind(1)
        slope = (x - teacher(x, begin, cond)) / per_sample(begin, x)
        x_mid = x + per_sample(mid - begin, x) * slope
        slope_mid = (x_mid - teacher(x_mid, mid, cond)) / per_sample(mid, x)
        x_end = x_mid + per_sample(end - mid, x) * slope_mid
        # the closed form of Salimans and Ho 2022, Appendix G, with alpha and sigma of the variance-preserving process
        alpha, alpha_end = (1 + begin**2) ** -0.5, (1 + end**2) ** -0.5
        ratio = (end * alpha_end) / (begin * alpha)
        z, z_end = per_sample(alpha, x) * x, per_sample(alpha_end, x) * x_end
        return (z_end - per_sample(ratio, x) * z) / per_sample(alpha_end - ratio * alpha, x)


@pytest.mark.parametrize("sampler", STEPS)
def test_the_exact_two_step_map_has_zero_loss(sampler):
    teacher = mixture()
    sigma_min = 0.002 if sampler == "encoder" else 0
    steps = STEPS[sampler](make_schedule("cosine", num_steps=8, sigma_min=sigma_min, sigma_max=80))
    batch = {"x": torch.randn(3, 2, 5, 7).double()}
    loss = StepDistillation(teacher, TwoSteps(teacher, steps), steps=steps, weighting=make_weighting("truncated_snr"))
    value = loss.loss(batch, torch.Generator().manual_seed(0)).value
    assert value.item() < 1e-20
    loss = StepDistillation(teacher, teacher, steps=steps, weighting=make_weighting("truncated_snr"))
    assert loss.loss(batch, torch.Generator().manual_seed(0)).value.item() > 1e-6


def test_teacher_and_student_are_given_the_same_w_and_labels_and_no_dropout():
    teacher, steps = Guided(), deterministic_steps(make_schedule("cosine", num_steps=8, sigma_min=0, sigma_max=80))
    student, batch = TwoSteps(teacher, steps), {"x": torch.randn(3, 2, 5, 7).double(), "y": torch.tensor([0, 1, 1])}
    weighting = make_weighting("snr_plus_one")
    loss = StepDistillation(teacher, student, steps=steps, weighting=weighting, w_range=(0.0, 4.0)).train()
    assert not any(module.training for module in loss.modules())
    assert loss.loss(batch, torch.Generator().manual_seed(0)).value.item() < 1e-20
    loss = StepDistillation(teacher, teacher, steps=steps, weighting=weighting, w_range=(0.0, 4.0))
    assert loss.loss(batch, torch.Generator().manual_seed(0)).value.item() > 1e-6


def test_steps_of_all_samplers():
    sigmas = torch.arange(8, -1, -1).double()
    assert deterministic_steps(sigmas).tolist() == [[8, 7, 6], [6, 5, 4], [4, 3, 2], [2, 1, 0]]
    assert stochastic_steps(sigmas).tolist() == [[8, 6, 4], [6, 4, 2], [4, 2, 0], [2, 1, 0]]
    assert stochastic_steps(sigmas[:3]).tolist() == [[8, 7, 6]]
    assert encoder_steps(1 + sigmas).tolist() == [[1, 2, 3], [3, 4, 5], [5, 6, 7], [7, 8, 9]]
    with pytest.raises(ValueError, match="even"):
        deterministic_steps(sigmas[:-1])
    with pytest.raises(ValueError, match="positive"):
        encoder_steps(sigmas)
    assert encoder_grid(sigmas[-3:], 0.5).tolist() == [2, 1, 0.5] and encoder_grid(1 + sigmas, 0.5)[-1] == 1


def test_an_ideal_chain_of_halvings_samples_like_its_first_teacher():
    """A student that equals two steps, on its own grid, ends where the teacher of twice the steps ends."""
    teacher, sigmas = mixture(), make_schedule("cosine", num_steps=8, sigma_min=0, sigma_max=80)
    student = TwoSteps(teacher, deterministic_steps(sigmas))
    from diffdistill.solvers import Euler

    noise = torch.randn(3, 2, 5, 7).double()
    end_teacher = sample(teacher, noise, solver=Euler(), sigmas=sigmas)
    end_student = sample(student, noise, solver=Euler(), sigmas=sigmas[::2])
    torch.testing.assert_close(end_student, end_teacher, rtol=1e-10, atol=1e-10)


def test_an_ideal_chain_of_halvings_encodes_like_its_first_teacher():
    teacher, sigmas = mixture(), make_schedule("cosine", num_steps=8, sigma_min=0.002, sigma_max=80)
    student = TwoSteps(teacher, encoder_steps(sigmas))
    x0 = torch.randn(3, 2, 5, 7).double()
    expected, found = encode(teacher, x0, sigmas=sigmas), encode(student, x0, sigmas=sigmas[::2])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (encode(teacher, x0, sigmas=sigmas[::2]) - expected).abs().max() > 1e-3


def test_the_target_of_a_step_to_zero_is_where_the_teacher_ends():
    teacher, x = mixture(), torch.randn(3, 2, 5, 7).double()
    sigma, mid, zero = (torch.full((3,), s, dtype=torch.float64) for s in (0.6, 0.2, 0.0))
    flow = ProbabilityFlow(teacher)
    target = two_hop_target(flow, flow, x, sigma, mid, zero)
    x_mid = x + (0.2 - 0.6) * (x - teacher(x, sigma)) / 0.6
    torch.testing.assert_close(target, teacher(x_mid, mid), rtol=1e-12, atol=1e-12)


def test_the_marginal_variance_of_the_stochastic_sampler_is_exact():
    """With data at one point the exact denoiser is constant, and every level's variance is sigma**2."""
    centre = torch.full((1, 2, 5), 0.3)
    point = GaussianMixture(weights=[1.0], means=centre, variances=[0.0])
    sigmas = torch.tensor([20.0, 7.0, 2.0, 0.5, 0.0]).double()
    batch = 40_000
    run = sample(
        point,
        torch.randn(batch, 2, 5).double(),
        solver=StochasticEuler(),
        sigmas=sigmas,
        seeds=range(batch),
        return_trajectory=True,
    )
    for x, sigma in zip(run.x, run.sigmas, strict=True):
        variance = (x - 0.3).var().item()
        assert math.isclose(variance, sigma.item() ** 2, rel_tol=4 * math.sqrt(2 / x.numel()), abs_tol=1e-12)
    assert run.nfe == 4


def test_the_stochastic_step_needs_noise_and_its_last_step_does_not():
    flow, x = ProbabilityFlow(mixture()), torch.randn(3, 2, 5, 7).double()
    level = [torch.full((3,), s).double() for s in (2.0, 1.0, 0.5)]
    with pytest.raises(ValueError, match="noise"):
        StochasticEuler().step(flow, x, Interval(level[0], level[1], sigma_after=level[2]))
    StochasticEuler().step(flow, x, Interval(level[1], level[2]))


def test_a_stage_holds_nothing_of_the_one_before_it(tmp_path):
    teacher = tiny_denoiser()
    batch, seen, alive = tiny_batch(teacher, 4), [], []

    def on_samples(model):
        alive.append(sum(earlier() is not None for earlier in seen))
        seen.append(weakref.ref(model))
        return torch.zeros(1, 1, 8, 8)

    trainer = {"updates": 1, "batch_size": 4, "ema_half_life": 10.0, "sample_every": 1, "device": "cpu"}
    sigmas = torch.tensor([80.0, 8.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    halving = Halving(sigmas, "deterministic", make_weighting("truncated_snr"), trainer)
    gc.disable()
    try:
        halve_steps(
            teacher,
            [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)],
            halving,
            Run(tmp_path, {}),
            on_samples=on_samples,
        )
    finally:
        gc.enable()
    assert alive == [0, 0]
