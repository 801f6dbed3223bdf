"""Guidance weights that depend on the noise level."""

import pytest
import torch

from diffdistill import sample
from diffdistill.models import ClassifierFreeGuidance, guided
from diffdistill.sampling.plans import plan
from diffdistill.solvers import cfg_plus_plus, guidance_interval, make_guidance_weight, make_schedule, make_solver

SIGMAS = make_schedule("karras", num_steps=6, sigma_min=0.05, sigma_max=20.0)
NOISE = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([1, 2, 4])


def answer(x, sigma, cond):
    level = sigma.view(-1, 1, 1, 1)
    return (x / (1 + level**2)).tanh() + 0.3 * cond.view(-1, 1, 1, 1) * torch.cos(x / (1 + level))


class Student(torch.nn.Module):
    """Takes w as an input and answers what guidance would, at one evaluation."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, sigma, cond=None, w=None):
        self.asked.append((float(sigma[0]), float(w[0])))
        w = w.to(x).view(-1, 1, 1, 1)
        return (1 + w) * answer(x, sigma, cond) - w * answer(x, sigma, torch.full_like(cond, -1))


def test_an_interval():
    student = Student()
    weight = guidance_interval(w=3.0, low=0.5, high=5.0)
    x = sample(student, NOISE, solver=make_solver("heun"), sigmas=SIGMAS, cond=LABELS, guidance=weight)
    assert {w for sigma, w in student.asked if 0.5 < sigma <= 5} == {3.0}
    assert {w for sigma, w in student.asked if not 0.5 < sigma <= 5} == {0.0}
    teacher = ClassifierFreeGuidance(answer, 0.0, null=torch.full_like(LABELS, -1))
    run = sample(
        teacher, NOISE, solver=make_solver("heun"), sigmas=SIGMAS, cond=LABELS, guidance=weight, return_trajectory=True
    )
    torch.testing.assert_close(run.x[-1], x)
    assert run.nfe == 2 * len(student.asked)


def test_cfg_plus_plus_is_euler_with_its_own_weights():
    scale, x = 0.6, NOISE * SIGMAS[0]
    for sigma, below in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):  # Chung et al. 2024, Algorithm 2
        level = sigma.expand(3)
        without = answer(x, level, torch.full_like(LABELS, -1))
        denoised = without + scale * (answer(x, level, LABELS) - without)
        x = denoised + below * (x - without) / sigma
    weight = cfg_plus_plus(scale=scale, sigmas=SIGMAS)
    options = {"solver": make_solver("ddim"), "sigmas": SIGMAS, "cond": LABELS, "guidance": weight}
    torch.testing.assert_close(sample(Student(), NOISE, **options), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no step begins at sigma"):
        sample(Student(), NOISE, **{**options, "solver": make_solver("dpm2")})


def test_levels_that_differ_between_samples_have_weights_of_their_own():
    from diffdistill.solvers import ProbabilityFlow

    seen = []

    def denoiser(x, sigma, cond, w):
        seen.append(w)
        return x

    flow = ProbabilityFlow(denoiser, guidance=guidance_interval(w=2.0, low=1.0))
    flow(NOISE, torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64))
    assert seen[0].tolist() == [0.0, 2.0, 2.0]


def test_what_is_refused():
    options = {"solver": make_solver("ddim"), "sigmas": SIGMAS, "cond": LABELS}
    with pytest.raises(ValueError, match=r"takes w with every call, but answer does not"):
        sample(answer, NOISE, guidance=guidance_interval(w=1.0), **options)
    with pytest.raises(ValueError, match="unknown guidance weight 'often': choose one of cfg_pp, interval"):
        make_guidance_weight("often", sigmas=SIGMAS)
    with pytest.raises(TypeError, match="guidance weight 'interval' has no option 'scale'"):
        make_guidance_weight("interval", sigmas=SIGMAS, scale=1.0)
    with pytest.raises(ValueError, match="0 <= low < high, but has 5"):
        make_guidance_weight("interval", sigmas=SIGMAS, w=1.0, low=5.0, high=0.3)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but is 7"):
        make_guidance_weight("cfg_pp", sigmas=SIGMAS, scale=7.0)


def test_plans_have_a_guidance():
    from diffdistill import load_denoiser
    from diffdistill.sampling.generation import generate

    model = load_denoiser("digits-guided")
    by_level = plan(model, num_steps=4, guidance={"name": "interval", "w": 2.0})
    labels = torch.tensor([3, 7])
    images = next(generate(by_level, [0, 1], labels))
    torch.testing.assert_close(images, next(generate(plan(model, num_steps=4, w=2.0), [0, 1], labels)))
    assert not torch.allclose(images, next(generate(plan(model, num_steps=4, w=0.0), [0, 1], labels)))
    with pytest.raises(ValueError, match="guidance has a weight of its own: leave out w=1"):
        plan(model, num_steps=4, w=1.0, guidance={"name": "interval", "w": 2.0})
    assert guided(model, 0.0).w == 0.0
