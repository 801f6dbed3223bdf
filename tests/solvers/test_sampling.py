"""Runs: stochastic solvers, thresholding, the analytical first step, labels, and what the package imports."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.models import GaussianMixture
from diffdistill.solvers import (
    SOLVERS,
    Interval,
    ProbabilityFlow,
    SampleNoise,
    dynamic_thresholding,
    integrate,
    intervals,
    make_schedule,
    make_solver,
    sample,
    seeded_noise,
)
from diffdistill.solvers.brownian import BrownianNoise

STOCHASTIC = {"edm_sde": {"churn": 10.0, "s_noise": 1.0}, "euler_ancestral": {"eta": 1.0}}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 7)])
def test_the_numbers_of_a_seed_are_those_of_torch(shape):
    seeds, stream = [5, 0, 2**40], SampleNoise([5, 0, 2**40], shape)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(2):
        assert torch.equal(stream.draw(), torch.stack([torch.randn(shape, generator=g) for g in generators]))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_marginal_variance_on_a_gaussian(name):
    """At every level the state is N(0, v + sigma^2) up to the error of the steps."""
    variance = 0.25
    gaussian = GaussianMixture([1.0], torch.zeros(1, 2, 4), [variance])
    sigmas = make_schedule("polynomial", num_steps=60, sigma_min=0.05, sigma_max=10.0)
    noise = seeded_noise(range(1500), (2, 4), dtype=torch.float64) * (1 + variance / 100) ** 0.5
    run = sample(gaussian, noise, solver=make_solver(name, **STOCHASTIC[name]), sigmas=sigmas, return_trajectory=True)
    measured = run.x.flatten(1).var(dim=1)
    torch.testing.assert_close(measured, variance + run.sigmas**2, rtol=0.08, atol=0.0)


@pytest.mark.parametrize("churn", [2.0, 40.0])
def test_edm_sde_is_algorithm_2_of_edm(churn):
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2])
    options = {"churn": churn, "s_min": 0.1, "s_max": 15.0, "s_noise": 1.01}
    sigmas = [*make_schedule("polynomial", num_steps=5, sigma_min=0.05, sigma_max=20.0).tolist(), 0.0]
    noise = seeded_noise([3, 11, 4], (2, 5), dtype=torch.float64)
    stream = SampleNoise([3, 11, 4], (2, 5))
    stream.draw()

    def slope(x, t):
        return (x - mixture(x, torch.full((3,), t, dtype=torch.float64))) / t

    x = sigmas[0] * noise
    for t, t_next in itertools.pairwise(sigmas):
        t_hat = t * (1 + min(churn / 6, 2**0.5 - 1)) if 0.1 <= t <= 15 else t
        x_hat = x + (t_hat**2 - t**2) ** 0.5 * 1.01 * stream.draw(dtype=torch.float64)
        d = slope(x_hat, t_hat)
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            x = x_hat + (t_next - t_hat) * (d + slope(x, t_next)) / 2
    found = sample(mixture, noise, solver=make_solver("edm_sde", **options), sigmas=sigmas, seeds=[3, 11, 4])
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_an_ancestral_step_is_equation_16_of_ddim(eta):
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2])
    sigma, sigma_next = torch.tensor([[9.0, 2.0, 0.7], [5.0, 0.1, 0.0]], dtype=torch.float64)
    x, noise = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    found, _ = make_solver("euler_ancestral", eta=eta).step(
        ProbabilityFlow(mixture), x, Interval(sigma, sigma_next), noise=noise
    )
    # In the variables of the variance-preserving process: z = sqrt(a) x, a = 1 / (1 + sigma^2).
    s, s_next = sigma.view(3, 1, 1), sigma_next.view(3, 1, 1)
    a, a_next, denoised = 1 / (1 + s**2), 1 / (1 + s_next**2), mixture(x, sigma)
    std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    z_next = a_next.sqrt() * denoised + (1 - a_next - std**2).sqrt() * (x - denoised) / s + std * noise
    torch.testing.assert_close(found, z_next / a_next.sqrt())


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_do_not_depend_on_the_batch(name):
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2])
    sigmas = make_schedule("polynomial", num_steps=4, sigma_min=0.05, sigma_max=10.0)
    solver, seeds = make_solver(name, **STOCHASTIC[name]), [3, 11, 4]

    def run(chosen):
        return sample(mixture, seeded_noise(chosen, (2, 5)), solver=solver, sigmas=sigmas, seeds=chosen)

    torch.testing.assert_close(run(seeds), torch.cat([run([seed]) for seed in seeds]))
    assert not torch.equal(run([3]), run([4]))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps_need_noise(name):
    flow = ProbabilityFlow(lambda x, sigma, cond: x)
    with pytest.raises(ValueError, match="pass noise"):
        make_solver(name).step(flow, torch.zeros(1, 2), intervals(torch.tensor([2.0, 1.0]), 1)[0])


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("amed", "flow_map")])
@pytest.mark.parametrize("zero", [False, True])
def test_levels_as_numbers_and_as_tensors_give_the_same(name, zero):
    """A run computes its coefficients on numbers; steps of a tensor of levels compute them on [B]."""
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2])
    sigmas = make_schedule("polynomial", num_steps=7, sigma_min=0.0 if zero else 0.05, sigma_max=40.0)
    solver, noise = make_solver(name), seeded_noise([3, 11, 4], (2, 5), dtype=torch.float64)
    stream = SampleNoise([3, 11, 4], (2, 5)) if solver.stochastic else None
    if solver.brownian:
        stream = BrownianNoise([3, 11, 4], (2, 5))
    elif stream is not None:
        stream.draw()
    *_, expected = integrate(ProbabilityFlow(mixture), 40 * noise, solver, intervals(sigmas, 3), stream)
    found = sample(mixture, noise, solver=solver, sigmas=sigmas, seeds=[3, 11, 4])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


class Count(TorchDispatchMode):
    """The operations of tensors, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ODE_SOLVERS = [name for name in SOLVERS.keys() - {"amed", "flow_map"} if SOLVERS[name].stochastic is not True]


@pytest.mark.parametrize("name", sorted({*ODE_SOLVERS} - {*STOCHASTIC}))
def test_a_step_takes_few_operations_and_reads_nothing_back(name):
    sigmas = make_schedule("polynomial", num_steps=20, sigma_min=0.05, sigma_max=40.0)
    solver, x = make_solver(name), torch.randn(3, 2, 5)
    steps = intervals(sigmas.tolist(), 3)
    for _ in range(2):  # the first run fills caches
        with Count() as counted:
            list(integrate(ProbabilityFlow(lambda x, sigma, cond: x), x, solver, steps))
    assert len(counted.names) <= 20 * 9 * solver.stages
    assert "_local_scalar_dense" not in counted.names  # a number read back makes the host wait for the device


def test_steps_of_a_tensor_are_differentiable():
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2])
    sigmas = torch.tensor([5.0, 2.0, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 5, dtype=torch.float64)

    def end(levels):
        return list(integrate(ProbabilityFlow(mixture), x, make_solver("unipc"), intervals(levels, 3)))[-1]

    assert torch.autograd.gradcheck(end, (sigmas,))


def test_a_sample_keeps_the_gradients_of_its_noise_and_no_others():
    scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    noise = torch.randn(3, 2, 5, dtype=torch.float64)
    run = {"solver": make_solver("dpmpp"), "sigmas": torch.tensor([5.0, 2.0, 1.0, 0.3])}

    def end(noise, trajectory=False):
        found = sample(lambda x, sigma, cond: torch.tanh(scale * x), noise, **run, return_trajectory=trajectory)
        return found.x if trajectory else found

    assert not end(noise).requires_grad and not end(noise, trajectory=True).requires_grad
    noise.requires_grad_()
    assert torch.autograd.gradcheck(end, (noise,)) and torch.autograd.gradcheck(lambda n: end(n, True), (noise,))
    with torch.no_grad():
        assert not end(noise).requires_grad


def test_analytical_first_step():
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    sigma = torch.tensor([80.0, 10.0, 1.0], dtype=torch.float64)
    flow = ProbabilityFlow(lambda x, sigma, cond: x)
    torch.testing.assert_close(flow.analytic(x, sigma).eps, x / (1 + sigma**2).sqrt().view(3, 1, 1))
    denoised = x * (1 - sigma / (1 + sigma**2).sqrt()).view(3, 1, 1)
    torch.testing.assert_close(flow.analytic(x.float(), sigma).denoised, denoised.float(), rtol=1e-6, atol=0)
    assert flow.nfe == 0


def test_dynamic_thresholding():
    x = torch.stack([torch.linspace(-0.8, 0.8, 35).view(5, 7), torch.linspace(-4.0, 4.0, 35).view(5, 7)])
    result = dynamic_thresholding(x)
    assert torch.equal(result[0], x[0])
    bound = torch.quantile(x[1].abs(), 0.995)
    torch.testing.assert_close(result[1], x[1].clamp(-bound, bound) / bound)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = dynamic_thresholding(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), result, rtol=0, atol=0.02)


def test_thresholding_reaches_every_prediction():
    seen = []
    options = {"solver": make_solver("heun", afs=True), "sigmas": torch.tensor([5.0, 2.0, 0.0])}
    mark = lambda denoised: seen.append(1) or denoised  # noqa: E731
    sample(lambda x, sigma, cond: 0 * x, torch.randn(3, 2, 5), thresholding=mark, **options)
    assert len(seen) == 3


def test_bad_input():
    mixture = GaussianMixture([0.5, 0.5], torch.randn(2, 2, 5), [0.1, 0.2], labels=[0, 1])
    noise, solver = torch.randn(3, 2, 5), make_solver("euler")
    good = {"solver": solver, "sigmas": torch.tensor([2.0, 1.0])}
    for sigmas in ([], [1.0, 2.0], [1.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError):
            sample(mixture, noise, solver=solver, sigmas=torch.tensor(sigmas))
    with pytest.raises(ValueError, match="dynamic"):
        sample(mixture, noise, thresholding="static", **good)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        sample(mixture, noise, cond=torch.tensor([0, 1]), **good)
    with pytest.raises(ValueError, match="0 to 1"):
        sample(mixture, noise, cond=torch.tensor([0, 1, 2]), **good)
    for seeds in ([3], [3, 4, 5, 6]):
        with pytest.raises(ValueError, match=f"each of the 3 samples, but there are {len(seeds)}"):
            sample(mixture, noise, solver=make_solver("euler_ancestral"), sigmas=good["sigmas"], seeds=seeds)
    with pytest.raises(ValueError, match=r"answers \[1, 2, 5\] for x of the shape \[3, 2, 5\]"):
        sample(lambda x, sigma, cond: x[:1], noise, **good)
    with pytest.raises(TypeError, match="solver must be a Solver, such as make_solver makes, but is 'euler'"):
        sample(mixture, noise, solver="euler", sigmas=good["sigmas"])
    with pytest.raises(TypeError, match=r"GaussianStart or None, but is 2\.5"):
        sample(mixture, noise, start=2.5, **good)


def test_imports_torch_numpy_and_scipy_only():
    """`diffdistill.solvers` brings in nothing but itself and is quick to import."""
    program = (
        "import sys, time, torch, numpy\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import diffdistill.solvers\n"
        "seconds = time.process_time() - start\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "inner = {'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('diffdistill.')}\n"
        "print(sorted(new - {'torch', 'numpy', 'scipy', 'diffdistill'}), sorted(inner), seconds)\n"
        "assert new <= {'torch', 'numpy', 'scipy', 'diffdistill'}\n"
        "assert not inner & {'diffdistill.models', 'diffdistill.training', 'diffdistill.data'}\n"
        "assert seconds < 0.3\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
