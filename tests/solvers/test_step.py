"""What holds for the step of every solver: precision, samples that do not mix, gradients, evaluations, bad input."""

import math

import pytest
import torch
from scipy.integrate import quad

from diffdistill.models import GaussianMixture
from diffdistill.solvers import (
    Correction,
    Euler,
    Interval,
    ProbabilityFlow,
    make_schedule,
    make_solver,
    sample,
    seeded_noise,
)
from diffdistill.solvers.deis import MODES, adams_weights
from tests.solvers.table import ROWS

SHAPE = (2, 5, 7)
NEWEST = [row for row in ROWS if row.options.get("order", 9) >= 3]


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    means = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return GaussianMixture([0.5, 0.3, 0.2], means, [0.3, 0.2, 0.4])


def levels(*sigmas: tuple[float, ...]) -> list[torch.Tensor]:
    """The columns of per-sample schedules, `[B]` each."""
    return list(torch.tensor(sigmas, dtype=torch.float64).T)


def chain(columns: list[torch.Tensor], total: int | None = None) -> list[Interval]:
    pairs = zip(columns, columns[1:], strict=False)
    return [Interval(a, b, index=i, total=total or len(columns) - 1) for i, (a, b) in enumerate(pairs)]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
def test_short_runs_are_the_same_in_both_precisions(row, num_steps, afs, sigma_min, mixture):
    if afs and not row.afs:
        pytest.skip("no analytical first step")
    solver = row.solver(afs=True) if afs else row.solver()
    sigmas = make_schedule("polynomial", num_steps=num_steps, sigma_min=sigma_min, sigma_max=80.0)
    runs = {}
    for dtype in (torch.float32, torch.float64):
        noise = seeded_noise(range(3), SHAPE, dtype=dtype)
        run = runs[dtype] = sample(mixture, noise, solver=solver, sigmas=sigmas, return_trajectory=True)
        assert run.x.shape == (num_steps + 1, 3, *SHAPE)
        assert run.x.dtype == dtype
        last = 1 if sigma_min == 0 else row.evaluations
        assert run.nfe == row.evaluations * (num_steps - 1) + last - afs
    double = runs[torch.float64].x.flatten(2).norm(dim=2)
    # Over a step from 80 down to 0.002 slopes of float32 are off by 80 eps / 0.002.
    assert (runs[torch.float32].x - runs[torch.float64].x).flatten(2).norm(dim=2).max() < 2e-3 * double.max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sigmas", [(0.3, 1.0, 3.0, 9.0, 30.0), (0.002, 2.0, 20.0, 50.0, 80.0), (40.0, 5.0, 0.2, 0.01)])
def test_weights_of_deis_are_the_integrals_of_lagranges_polynomials(mode, sigmas):
    # Time of the VP process that has the levels 0.002 and 80 at the times 0.001 and 1 (Karras et al. 2022).
    low, high = math.log(0.002**2 + 1), math.log(80.0**2 + 1)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2

    def variable(s):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s**2)) - beta_min) / beta_d if mode == "tab" else s

    sigma_next, *nodes = sigmas
    found = adams_weights(MODES[mode], sigma_next, nodes)
    for j, node in enumerate(nodes):

        def basis(log_s, j=j, node=node):
            others = [variable(other) for i, other in enumerate(nodes) if i != j]
            s = math.exp(log_s)
            return s * math.prod((variable(s) - other) / (variable(node) - other) for other in others)

        expected, _ = quad(basis, math.log(nodes[0]), math.log(sigma_next), epsabs=0, epsrel=1e-11, limit=200)
        assert found[j] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_a_run_that_never_reaches_its_order_does_not_lower_it(name, mixture):
    sigmas, noise = torch.tensor([9.0, 3.0, 1.0]), seeded_noise(range(3), SHAPE, dtype=torch.float64)
    third = sample(mixture, noise, solver=make_solver(name, order=3), sigmas=sigmas)
    second = sample(mixture, noise, solver=make_solver(name, order=2, lower_order_final=False), sigmas=sigmas)
    torch.testing.assert_close(third, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_last_step_to_zero_returns_the_denoised_image(row, mixture):
    solver = row.solver(**row.deterministic)
    sigmas = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    noise = seeded_noise(range(3), SHAPE, dtype=torch.float64)
    run = sample(mixture, noise, solver=solver, sigmas=sigmas, return_trajectory=True, denoise_to_zero=True)
    assert run.sigmas.tolist() == [5.0, 2.0, 1.0, 0.0]
    torch.testing.assert_close(run.x[-1], mixture(run.x[-2], torch.ones(3, dtype=torch.float64)))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_per_sample_sigma_is_a_loop_over_samples(row, mixture):
    solver = row.solver()
    schedules = [(80.0, 20.0, 6.0, 1.5, 0.4), (30.0, 10.0, 2.0, 0.5, 0.02), (9.0, 8.0, 5.0, 0.1, 0.05)]
    noise = seeded_noise(range(3), SHAPE, dtype=torch.float64)
    extra = [seeded_noise(range(10 * k, 10 * k + 3), SHAPE, dtype=torch.float64) for k in range(4)]

    def run(rows: slice) -> torch.Tensor:
        columns = levels(*schedules[rows])
        x, history = noise[rows] * columns[0].view(-1, 1, 1, 1), ()
        for interval, z in zip(chain(columns), extra, strict=True):
            x, history = solver.step(ProbabilityFlow(mixture), x, interval, history, noise=z[rows])
        return x

    alone = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(run(slice(0, 3)), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gradients_of_a_step(row):
    """Of the fourth step, which uses all of the history, with respect to the state and all levels."""
    means = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixture = GaussianMixture([0.6, 0.4], means, [0.3, 0.2])
    solver = row.solver(**row.deterministic)
    noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def last(x: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
        history = ()
        for interval in chain(list(columns), total=9):
            x, history = solver.step(ProbabilityFlow(mixture), x, interval, history, noise=noise)
        return x

    inputs = [2 * noise, *levels((3.0, 2.5, 1.9, 1.2, 0.8), (2.8, 2.1, 1.6, 1.1, 0.5))]
    assert torch.autograd.gradcheck(last, [v.clone().requires_grad_() for v in inputs], eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("row", [r for r in ROWS if r.solver().takes_correction], ids=str)
def test_corrections_scale_the_term_of_the_network(row, mixture):
    solver = row.solver(**row.deterministic)
    noise = seeded_noise(range(3), SHAPE, dtype=torch.float64)
    columns = levels((9.0, 5.0, 3.0, 1.0), (8.0, 6.0, 2.0, 0.5), (7.0, 4.0, 1.0, 0.3))
    *first, last = chain(columns, total=9)
    x, history = 9 * noise, ()
    flow = ProbabilityFlow(mixture)
    for interval in first:
        x, history = solver.step(flow, x, interval, history, noise=0 * noise)

    def step(scale: float) -> torch.Tensor:
        correction = Correction(scale_dir=torch.full((3,), scale))
        return solver.step(flow, x, last, history, correction=correction, noise=0 * noise)[0]

    plain = solver.step(flow, x, last, history, noise=0 * noise)[0]
    torch.testing.assert_close(step(1.0), plain)
    # Affine in the scale; what is left at scale 0 is linear in x alone.
    torch.testing.assert_close(step(1.0) - step(0.5), step(0.5) - step(0.0))
    rest = step(0.0)
    if row.options.get("prediction") == "x0" or row.name == "dpmpp_2s":
        rest = rest / (last.sigma_next / last.sigma).view(-1, 1, 1, 1)
    if row.name != "unipc":  # whose corrector moves x first
        torch.testing.assert_close(rest, x)

    given = []
    asked = ProbabilityFlow(lambda x, sigma, cond: given.append(sigma) or mixture(x, sigma))
    factor = torch.tensor([0.9, 1.0, 1.2])
    solver.step(asked, x, last, history, correction=Correction(scale_time=factor), noise=0 * noise)
    nominal = last.sigma if solver.stages == 1 else last.sigma_next**solver.r * last.sigma ** (1 - solver.r)
    torch.testing.assert_close(given[-1], nominal * factor)


def test_solvers_without_a_free_place_refuse_a_correction(mixture):
    interval = chain(levels((3.0, 1.0)))[0]
    for name in ("heun", "dpm3", "dpmpp_3s"):
        with pytest.raises(TypeError, match="takes no correction"):
            make_solver(name).step(ProbabilityFlow(mixture), torch.zeros(1, *SHAPE), interval, correction=Correction())


def test_heun_is_algorithm_1_of_edm(mixture):
    sigmas = make_schedule("polynomial", num_steps=5, sigma_min=0.01, sigma_max=80.0).tolist() + [0.0]
    noise = seeded_noise(range(3), SHAPE, dtype=torch.float64)
    x = noise * sigmas[0]
    for t, t_next in zip(sigmas, sigmas[1:], strict=False):
        d = (x - mixture(x, torch.full((3,), t))) / t
        x_next = x + (t_next - t) * d
        if t_next > 0:
            x_next = x + (t_next - t) * (d + (x_next - mixture(x_next, torch.full((3,), t_next))) / t_next) / 2
        x = x_next
    run = sample(mixture, noise, solver=make_solver("heun"), sigmas=torch.tensor(sigmas), return_trajectory=True)
    assert run.nfe == 2 * 6 - 1
    torch.testing.assert_close(run.x[-1], x, rtol=1e-5, atol=1e-5)


def test_invert_undoes_a_step_of_euler(mixture):
    interval = chain(levels((9.0, 5.0), (8.0, 6.0), (0.7, 0.0)))[0]
    x = seeded_noise(range(3), SHAPE, dtype=torch.float64)
    x_next, _ = Euler().step(ProbabilityFlow(mixture), x, interval)
    torch.testing.assert_close(Euler.invert(x, x_next, interval), mixture(x, interval.sigma))


def test_euler_backwards_encodes(mixture):
    """The step with sigma increasing is the same step."""
    up, down = chain(levels((1.0, 1.001, 1.0)))
    x = seeded_noise(range(1), SHAPE, dtype=torch.float64)
    flow = ProbabilityFlow(mixture)
    there, _ = Euler().step(flow, x, up)
    back, _ = Euler().step(flow, there, down)
    assert (back - x).norm() < 1e-2 * (there - x).norm()


def test_two_halves_make_the_interval():
    columns = levels((9.0, 5.0, 1.0), (8.0, 6.0, 2.0))
    interval = Interval(columns[0], columns[1], index=2, total=4, sigma_after=columns[2])
    middle = torch.tensor([7.0, 6.5], dtype=torch.float64)
    first, second = interval.split(middle)
    assert (first.index, first.total, second.index, second.total) == (4, 8, 5, 8)
    for part, expected in (
        (first, (columns[0], middle, columns[1])),
        (second, (middle, columns[1], columns[2])),
    ):
        assert torch.equal(torch.stack([part.sigma, part.sigma_next, part.sigma_after]), torch.stack(expected))


@pytest.mark.parametrize("row", NEWEST, ids=str)
def test_history_is_bounded_and_not_changed(row, mixture):
    solver = row.solver()
    columns = levels(*[(9.0, 7.0, 5.0, 3.0, 2.0, 1.0)] * 3)
    x, history = seeded_noise(range(3), SHAPE), ()
    for interval in chain(columns):
        before = history
        x, history = solver.step(ProbabilityFlow(mixture), x, interval, history, noise=torch.zeros_like(x))
        assert len(before) <= solver.memory
    assert len(history) == solver.memory


@pytest.mark.parametrize(
    ("name", "options", "error", "valid"),
    [
        ("eular", {}, ValueError, "euler"),
        ("euler", {"order": 1}, TypeError, "afs"),
        ("ipndm", {"order": 5}, ValueError, "1 to 4"),
        ("ipndm_v", {"order": 0}, ValueError, "1 to 4"),
        ("deis", {"order": 2.0}, ValueError, "1 to 4"),
        ("deis", {"mode": "rho"}, ValueError, "tab, rhoab"),
        ("dpmpp", {"order": 4}, ValueError, "1 to 3"),
        ("dpmpp", {"prediction": "v"}, ValueError, "x0, eps"),
        ("dpmpp", {"third_order": "right"}, ValueError, "published, exact"),
        ("unipc", {"order": 4}, ValueError, "1 to 3"),
        ("unipc", {"variant": "bh3"}, ValueError, "bh1, bh2"),
        ("dpm2", {"r": 0.0}, ValueError, r"\(0, 1\]"),
        ("euler_ancestral", {"eta": 1.5}, ValueError, r"\[0, 1\]"),
        ("edm_sde", {"afs": True}, TypeError, "it takes churn, s_min, s_max, s_noise"),
        ("edm_sde", {"churn": -1.0}, ValueError, "negative"),
        ("edm_sde", {"s_min": 2.0, "s_max": 1.0}, ValueError, "ordered"),
    ],
)
def test_bad_options(name, options, error, valid):
    with pytest.raises(error, match=valid):
        make_solver(name, **options)
