"""Stochastic solvers: Brownian paths, the SDE of DPM-Solver++, LCM and TCD against their published formulas."""

import math

import pytest
import torch

from diffdistill import sample
from diffdistill.solvers import ProbabilityFlow, intervals, make_schedule, make_solver
from diffdistill.solvers.brownian import BrownianNoise
from diffdistill.solvers.discrete_time import scaled_linear_table

SHAPE = (2, 5, 7)


def draw(noise, sigma, sigma_next):
    return noise.draw(dtype=torch.float64, interval=intervals([sigma, sigma_next], len(noise.seeds))[0])


def test_a_path_is_the_same_on_every_schedule():
    noise = BrownianNoise([3, 11, 3], SHAPE)
    whole = draw(noise, 8.0, 2.0) * math.log(4) ** 0.5
    parts = draw(noise, 8.0, 3.0) * math.log(8 / 3) ** 0.5 + draw(noise, 3.0, 2.0) * math.log(1.5) ** 0.5
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    torch.testing.assert_close(draw(BrownianNoise([11], SHAPE), 8.0, 2.0)[0] * math.log(4) ** 0.5, whole[1])
    assert not draw(noise, 0.5, 0.0).any()


def test_increments_are_standard_normal_and_apart():
    noise = BrownianNoise([5], (4000,))
    first, second = draw(noise, 30.0, 7.0), draw(noise, 7.0, 6.9)
    for increment in (first, second):
        assert abs(float(increment.mean())) < 0.06 and abs(float(increment.std()) - 1) < 0.05
    assert abs(float((first * second).mean())) < 0.06


@pytest.mark.parametrize("order", [2, 3])
def test_a_seed_gives_nearly_the_same_sample_at_any_number_of_steps(order):
    def error(num_steps):
        sigmas = make_schedule("logsnr", num_steps=num_steps, sigma_min=0.05, sigma_max=5.0)
        options = {"solver": make_solver("dpmpp_sde", order=order), "sigmas": sigmas, "seeds": [4, 9]}
        return sample(lambda x, sigma, cond: 0.5 * x / (1 + sigma.view(-1, 1, 1, 1)), torch.ones(2, *SHAPE), **options)

    coarse, fine, finest = error(20), error(40), error(160)
    assert float((fine - finest).abs().max()) < 0.7 * float((coarse - finest).abs().max())
    assert float((fine - finest).abs().max()) < 0.3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_marginals_of_the_sde_are_those_of_gaussian_data(order):
    def denoiser(x, sigma, cond):
        return x / (1 + sigma.view(-1, 1) ** 2)  # of data of unit variance

    noise = torch.randn(2, 20000, generator=torch.Generator().manual_seed(1))
    sigmas = make_schedule("karras", num_steps=20, sigma_min=0.05, sigma_max=10.0)
    x = sample(denoiser, noise, solver=make_solver("dpmpp_sde", order=order), sigmas=sigmas)
    assert abs(float(x.std()) - 1) < (0.15 if order == 1 else 0.03)


def test_two_steps_of_2m_sde():
    """k-diffusion's update, with plain numbers."""
    sigmas, noise = [6.0, 3.0, 1.0], torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    denoiser = lambda x, sigma, cond: (x / 7).tanh()  # noqa: E731
    x = ours = torch.randn(2, *SHAPE, dtype=torch.float64)
    solver, history, old, h_last = make_solver("dpmpp_sde", order=2, eta=0.7), (), None, None
    flow = ProbabilityFlow(denoiser)
    for step, draws in zip(intervals(sigmas, 2), noise, strict=True):
        ours, history = solver.step(flow, ours, step, history, noise=draws)
        sigma, below = sigmas[step.index : step.index + 2]
        h = math.log(sigma / below)
        h_eta, denoised = h * 1.7, denoiser(x, None, None)
        x = below / sigma * math.exp(-0.7 * h) * x - math.expm1(-h_eta) * denoised
        if old is not None:
            x = x - 0.5 * math.expm1(-h_eta) * (h / h_last) * (denoised - old)
        x = x + draws * below * math.sqrt(-math.expm1(-2 * h * 0.7))
        old, h_last = denoised, h
    torch.testing.assert_close(ours, x)


def test_lcm_and_tcd_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    table = scaled_linear_table()
    network = lambda x: (0.7 * x).tanh()  # noqa: E731
    for name, kind, options in (("lcm", "LCMScheduler", {}), ("tcd", "TCDScheduler", {"eta": 0.4})):
        stock = getattr(diffusers, kind)(**betas)
        stock.set_timesteps(4)
        draw = torch.Generator().manual_seed(2)
        latents = start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
        for t in stock.timesteps:
            latents = stock.step(network(latents), t, latents, generator=draw, **options).prev_sample
        last = 0.0 if name == "lcm" else float(table[0])  # where TCD of diffusers ends
        sigmas = [*table[stock.timesteps].tolist(), last]
        draw.manual_seed(2)

        def denoiser(x, sigma, cond):
            level = sigma.view(-1, 1, 1, 1).to(x.dtype)
            return x - level * network(x / (1 + level**2).sqrt())

        x, history, flow = start * (1 + sigmas[0] ** 2) ** 0.5, (), ProbabilityFlow(denoiser)
        for step in intervals(sigmas, 2):
            noise = torch.zeros(1) if step.index == 3 else torch.randn(2, *SHAPE, generator=draw)
            x, history = make_solver(name, **options).step(flow, x, step, history, noise=noise)
        x = x / (1 + last**2) ** 0.5
        torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
