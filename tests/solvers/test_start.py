"""The analytic start: exact on a Gaussian in every form of the covariance, guided or not, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from diffdistill.models import ClassifierFreeGuidance, GaussianMixture
from diffdistill.solvers import (
    GaussianStart,
    GaussianStatistics,
    choose_start_sigma,
    load_gaussian,
    make_schedule,
    make_solver,
    sample,
    save_gaussian,
)
from diffdistill.solvers.gaussian.covariances import FORMS, FourierCovariance, FullCovariance, LowRankCovariance

SHAPE = (2, 6, 5)
D = 60
LEVELS = torch.tensor([10.0, 5.0, 1.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, -1])


def unguided(x, sigma, cond):
    """A denoiser that states nothing."""
    return x


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(covariance):
    """The covariances of 3 rows as matrices `[3, D, D]`."""
    if isinstance(covariance, FullCovariance):
        return covariance.vectors @ torch.diag_embed(covariance.values) @ covariance.vectors.mT
    if isinstance(covariance, LowRankCovariance):
        return covariance.factors @ covariance.factors.mT + torch.diag_embed(covariance.diagonal)
    unit = torch.eye(D, dtype=torch.float64).view(D, *SHAPE)
    columns = [covariance.apply(unit, torch.full((D,), row), lambda values: values).flatten(1) for row in range(3)]
    return torch.stack(columns)


def statistics(form, seed=0):
    """Statistics of 2 classes on [2, 6, 5], with a covariance of the form, eigenvalues between 0 and 10."""
    if form == "full":
        covariance = FullCovariance(10 * double(3, D, seed=seed).sigmoid(), torch.linalg.qr(double(3, D, D))[0])
    elif form == "low_rank":
        covariance = LowRankCovariance(double(3, D, 4, seed=seed), double(3, D, seed=1).abs())
    else:
        # The spectrum of real images, which is even.
        spectrum = torch.fft.rfft2(double(3, *SHAPE, seed=seed)).abs()
        covariance = FourierCovariance(spectrum, torch.linalg.qr(double(3, 2, 2))[0])
    return GaussianStatistics(double(3, *SHAPE, seed=2), covariance)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_for_all_is_the_row_of_the_null_label(form):
    stats, x, sigma = statistics(form), double(4, *SHAPE, seed=3), torch.tensor([0.1, 1.0, 5.0, 70.0]).double()
    null = torch.full((4,), -1)
    torch.testing.assert_close(stats.denoise(x, sigma), stats.denoise(x, sigma, null))
    torch.testing.assert_close(stats.carry(x, 9.0, 2.0), stats.carry(x, 9.0, 2.0, null))


def by_matrix(stats, function, v):
    """`f(C) v` for each sample, by the eigenvalues of the whole matrix."""
    values, vectors = torch.linalg.eigh(matrices(stats.covariance))
    of = vectors @ torch.diag_embed(function(values.clamp(min=0))) @ vectors.mT
    return torch.einsum("bde,be->bd", of[LABELS], v.flatten(1)).view_as(v)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("levels", [(80.0, 10.0), (10.0, 0.5), (80.0, 0.002), (80.0, 80.0)])
def test_the_flow_of_a_gaussian_is_exact(form, levels):
    high, low = levels
    stats, x = statistics(form), high * double(4, *SHAPE, seed=3)
    mean = stats.mean[LABELS]
    expected = mean + by_matrix(stats, lambda v: ((v + low**2) / (v + high**2)).sqrt(), x - mean)
    assert ((stats.carry(x, high, low, LABELS) - expected).norm() / expected.norm()).item() < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_the_denoiser_is_the_posterior_mean(form):
    stats, x, sigma = statistics(form), double(4, *SHAPE, seed=3), torch.tensor([0.1, 1.0, 5.0, 70.0]).double()
    mean = stats.mean[LABELS]
    values = [by_matrix(stats, lambda v, s=s: v / (v + s**2), x - mean)[i] for i, s in enumerate(sigma)]
    conditional = mean + torch.stack(values)
    torch.testing.assert_close(stats.denoise(x, sigma, LABELS), conditional, rtol=1e-10, atol=1e-10)
    # Guided, (1 + w) D_c - w D_null; the last sample has no class, so that nothing guides it.
    null = stats.denoise(x, sigma)
    for w in (torch.tensor([0.5, 1.0, 2.0, 3.0]), 1.5):
        weights = torch.as_tensor(w).view(-1, 1, 1, 1)
        guided = (1 + weights) * conditional - weights * null
        torch.testing.assert_close(stats.denoise(x, sigma, LABELS, w), guided, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("w", [0.0, 2.0])
def test_the_flow_solves_the_equation_of_its_denoiser(form, w):
    """dx/dsigma = (x - D) / sigma, by central differences, guided too."""
    stats, h = statistics(form), 1e-3
    start = GaussianStart(stats, 3.0)
    noise = 5.0 * double(4, *SHAPE, seed=3)
    before, x, after = (start.carry(noise, 5.0, s, LABELS, w) for s in (3.0 + h, 3.0, 3.0 - h))
    assert w == 0 or not torch.allclose(x, start.carry(noise, 5.0, 3.0, LABELS), atol=0.1)
    slope = (x - stats.denoise(x, torch.full((4,), 3.0).double(), LABELS, w)) / 3.0
    torch.testing.assert_close((before - after) / (2 * h), slope, rtol=0, atol=0.1 if w else 1e-5)


def test_guidance_between_equal_gaussians_is_none():
    """Where all classes have one Gaussian, the integrated flow is the closed form."""
    stats = statistics("full")
    same = FullCovariance(*(t[:1].expand_as(t) for t in stats.covariance.tensors().values()))
    stats = replace(stats, mean=stats.mean[:1].expand_as(stats.mean), covariance=same)
    start, x = GaussianStart(stats, 5.0), 80 * double(4, *SHAPE, seed=3)
    exact = start.carry(x, 80.0, 5.0, LABELS)
    torch.testing.assert_close(start.carry(x, 80.0, 5.0, LABELS, w=3.0), exact, rtol=0, atol=1e-3)
    per_sample = start.carry(x, 80.0, 5.0, LABELS, w=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(per_sample, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("form", "rank"), [("full", None), ("low_rank", 3), ("fourier", None)])
def test_fitting(form, rank):
    """What a form can hold is what the samples have; the low-rank form keeps every variance."""
    x, y = double(400, *SHAPE), torch.arange(400) % 2
    x = x * torch.linspace(0.5, 2, 5) + y.view(-1, 1, 1, 1)
    stats = GaussianStatistics.fit(x, y, num_classes=2, form=form, rank=rank)
    assert (stats.num_classes, stats.data_shape) == (2, SHAPE)
    for row, group in enumerate((x[y == 0], x[y == 1], x)):
        sample_covariance = group.flatten(1).T.cov()
        torch.testing.assert_close(stats.mean[row], group.mean(0))
        matrix = matrices(stats.covariance)[row]
        torch.testing.assert_close(matrix.trace(), sample_covariance.trace())
        if form == "full":
            torch.testing.assert_close(matrix, sample_covariance)
        if form == "low_rank":
            torch.testing.assert_close(matrix.diagonal(), sample_covariance.diagonal())
            factors = stats.covariance.factors[row]
            torch.testing.assert_close(sample_covariance @ factors, factors @ (factors.T @ factors))
            largest = torch.linalg.eigvalsh(sample_covariance)[-rank:]
            torch.testing.assert_close(factors.square().sum(0).flip(0), largest)


def test_fourier_is_exact_on_stationary_images():
    """A circulant covariance with correlated channels is recovered from its own samples' second moments."""
    stats = statistics("fourier")
    root = [torch.linalg.cholesky(m) for m in matrices(stats.covariance)]
    # Samples +- sqrt(D) times the columns of the root have exactly this covariance, up to the factor of N - 1.
    columns = torch.cat([root[0].T, -root[0].T]) * D**0.5
    fitted = GaussianStatistics.fit(columns.view(-1, *SHAPE), form="fourier")
    expected = matrices(stats.covariance)[0] * (2 * D) / (2 * D - 1)
    torch.testing.assert_close(matrices(replace_rows(fitted).covariance)[0], expected)


def replace_rows(stats):
    return replace(
        stats, covariance=FourierCovariance(*(t.expand(3, *t.shape[1:]) for t in stats.covariance.tensors().values()))
    )


def test_a_run_from_the_start_is_the_run_from_the_top():
    """On an isotropic Gaussian the start leaves no error of its own, at any sigma, and costs no evaluation."""
    gaussian = GaussianMixture([1.0], double(1, *SHAPE), [0.3])
    eye = torch.eye(D, dtype=torch.float64)[None]
    stats = GaussianStatistics(gaussian.means, FullCovariance(torch.full((1, D), 0.3, dtype=torch.float64), eye))
    noise, solver = double(3, *SHAPE, seed=3), make_solver("unipc", order=3)
    for sigma in (40.0, 10.0, 1.0):
        sigmas = make_schedule("logsnr", num_steps=60, sigma_min=0.1, sigma_max=sigma)
        run = sample(
            gaussian, noise, solver=solver, sigmas=sigmas, start=GaussianStart(stats, sigma), return_trajectory=True
        )
        scale = ((0.3 + run.sigmas**2) / (0.3 + 80.0**2)).sqrt().view(-1, 1, 1, 1, 1)
        exact = gaussian.means + scale * (80 * noise - gaussian.means)
        torch.testing.assert_close(run.x[0], exact[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(run.x, exact, rtol=0, atol=1e-3)
        assert run.nfe == 60


def test_the_state_keeps_its_dtype():
    stats = statistics("full")
    assert GaussianStart(stats, 5.0).carry(torch.randn(4, *SHAPE), 80.0, 5.0, LABELS, w=1.0).dtype == torch.float32
    assert stats.denoise(torch.randn(4, *SHAPE), torch.ones(4), LABELS).dtype == torch.float32


@pytest.mark.parametrize("sigma", [3.5, 7.0, 14.0, 79.0])
def test_the_past_of_a_guided_start(sigma):
    """The first past level may come to lie at sigma_max, up to rounding."""
    stats, noise = statistics("full"), double(4, *SHAPE, seed=3)
    start = GaussianStart(stats, sigma, sigma_max=80.0, w=2.0)
    sigmas = torch.tensor([sigma, sigma / 9, 0.1], dtype=torch.float64)
    x, history = start.begin(unguided, noise, sigmas, LABELS, memory=2)
    torch.testing.assert_close(x, start.carry(80 * noise, 80.0, sigma, LABELS, w=2.0), rtol=0, atol=0.02)
    for evaluation in history:  # of the Gaussians under guidance
        x, level, nothing = evaluation.x, evaluation.sigma, torch.full_like(LABELS, -1)
        expected = 3 * stats.denoise(x, level, LABELS) - 2 * stats.denoise(x, level, nothing)
        torch.testing.assert_close(evaluation.denoised, expected)


def test_the_weight_of_a_guided_denoiser_is_used():
    mixture = GaussianMixture([0.5, 0.5], double(2, *SHAPE), [0.2, 0.4], labels=[0, 1])
    stats = GaussianStatistics.fit(mixture.sample_data(500), torch.arange(500) % 2, num_classes=2)
    noise, cond, start = double(3, *SHAPE, seed=3), torch.tensor([0, 1, 1]), GaussianStart(stats, 10.0)
    guided = ClassifierFreeGuidance(mixture, 2.0)
    torch.testing.assert_close(
        start.begin(guided, noise, LEVELS, cond)[0], start.carry(80 * noise, 80.0, 10.0, cond, w=2.0), rtol=0, atol=0
    )
    explicit = replace(start, w=2.0, sigma_max=80.0)
    same = explicit.begin(lambda x, sigma, cond: x, noise, LEVELS, cond)[0]
    torch.testing.assert_close(same, start.begin(guided, noise, LEVELS, cond)[0], rtol=0, atol=0)


@pytest.mark.parametrize("top", [80.0, 30.0])
def test_multistep_solvers_begin_with_a_past(top):
    """It lies on the Gaussian's trajectory, above the start, and no higher than sigma_max."""
    stats, noise = statistics("full"), double(4, *SHAPE, seed=3)
    start = GaussianStart(stats, 10.0, sigma_max=top)
    x, history = start.begin(unguided, noise, LEVELS, LABELS, memory=2)
    levels = [40.0, 20.0] if top == 80.0 else [30.0, 300.0**0.5]
    for evaluation, level in zip(history, levels, strict=True):
        torch.testing.assert_close(evaluation.sigma, torch.full((4,), level, dtype=torch.float64))
        torch.testing.assert_close(evaluation.x, stats.carry(top * noise, top, level, LABELS))
        torch.testing.assert_close(evaluation.denoised, stats.denoise(evaluation.x, evaluation.sigma, LABELS))
    cold = replace(start, warm=False).begin(unguided, noise, LEVELS, LABELS, memory=2)
    torch.testing.assert_close(x, cold[0])
    assert cold[1] == ()
    assert GaussianStart(stats, 10.0, sigma_max=10.0).begin(unguided, noise, LEVELS, LABELS, memory=2)[1] == ()


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpmpp", {"lower_order_final": False}), ("unipc", {"lower_order_final": False}), ("deis", {}), ("ipndm_v", {})],
)
def test_the_past_raises_the_order_of_the_first_step(name, options):
    """The error of one step, halved, falls by 8 instead of by 4."""
    gaussian = GaussianMixture([1.0], double(1, *SHAPE), [0.3])
    eye = torch.eye(D, dtype=torch.float64)[None]
    stats = GaussianStatistics(gaussian.means, FullCovariance(torch.full((1, D), 0.3, dtype=torch.float64), eye))
    noise, solver = double(3, *SHAPE, seed=3), make_solver(name, order=2, **options)

    def error(step, warm):
        sigmas = torch.tensor([1.0, 1.0 - step], dtype=torch.float64)
        x = sample(gaussian, noise, solver=solver, sigmas=sigmas, start=GaussianStart(stats, 1.0, warm=warm))
        return (x - stats.carry(80 * noise, 80.0, 1.0 - step)).norm().item()

    assert error(0.1, False) / error(0.05, False) == pytest.approx(4, rel=0.15)
    assert error(0.1, True) / error(0.05, True) == pytest.approx(8, rel=0.15)


def test_gaussian_first_step():
    """`afs="gaussian"` answers the first evaluation from the statistics: exact here, and one evaluation less."""
    gaussian = GaussianMixture([1.0], double(1, *SHAPE), [0.3])
    eye = torch.eye(D, dtype=torch.float64)[None]
    stats = GaussianStatistics(gaussian.means, FullCovariance(torch.full((1, D), 0.3, dtype=torch.float64), eye))
    sigmas, noise = torch.tensor([80.0, 9.0, 1.0]), double(3, *SHAPE, seed=3)

    def run(afs, **options):
        solver = make_solver("dpm2", afs=afs)
        return sample(gaussian, noise, solver=solver, sigmas=sigmas, return_trajectory=True, **options)

    with_statistics, plain = run("gaussian", start=GaussianStart(stats, 80.0)), run(False)
    torch.testing.assert_close(with_statistics.x, plain.x, rtol=1e-9, atol=1e-9)
    assert (with_statistics.nfe, plain.nfe) == (3, 4)
    assert not torch.allclose(run(True).x, plain.x)
    with pytest.raises(ValueError, match="pass start"):
        run("gaussian")


@pytest.mark.parametrize(("form", "rank"), [("full", None), ("low_rank", 3), ("fourier", None)])
def test_files(form, rank, tmp_path):
    stats = GaussianStatistics.fit(double(50, *SHAPE), torch.arange(50) % 2, num_classes=2, form=form, rank=rank)
    save_gaussian(replace(stats, provenance={"samples": 50}), tmp_path / "stats.safetensors")
    loaded = load_gaussian(tmp_path / "stats.safetensors")
    x = double(4, *SHAPE, seed=5)
    torch.testing.assert_close(loaded.carry(x, 80.0, 3.0, LABELS), stats.carry(x, 80.0, 3.0, LABELS), rtol=0, atol=0)
    assert loaded.provenance == {"samples": 50}
    (tmp_path / "stats.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="not a whole"):
        load_gaussian(tmp_path / "stats.safetensors")
    with pytest.raises(ValueError, match="choose one of"):
        load_gaussian("nothing")


def test_choosing_the_start():
    """On data of three distant points a Gaussian is right only at high noise, so the choice lies in between."""
    mixture = GaussianMixture([0.3, 0.3, 0.4], 2 * double(3, *SHAPE), [0.01] * 3)
    stats = GaussianStatistics.fit(mixture.sample_data(2000))
    noise, solver = double(32, *SHAPE, seed=3), make_solver("dpmpp", order=2)

    def schedule(top):
        return make_schedule("polynomial", num_steps=5, sigma_min=0.002, sigma_max=top)

    options = {"solver": solver, "schedule": schedule}
    choice = choose_start_sigma(mixture, stats, noise, candidates=(100.0, 30.0, 10.0, 0.05), **options)
    assert set(choice.errors) == {None, 30.0, 10.0, 0.05}
    assert choice.sigma in (30.0, 10.0)
    assert choice.errors[choice.sigma] == min(choice.errors.values()) < 0.8 * choice.errors[None]
    norms = choose_start_sigma(mixture, stats, noise, candidates=(), reference=0 * noise, **options)
    x = sample(mixture, noise, solver=solver, sigmas=schedule(80.0))
    assert (norms.sigma, norms.errors) == (None, {None: pytest.approx(float(x.flatten(1).norm(dim=1).mean()))})


def test_bad_input():
    stats, noise = statistics("full"), torch.randn(4, *SHAPE)
    sigmas, options = torch.tensor([80.0, 1.0]), {"solver": make_solver("euler")}
    with pytest.raises(ValueError, match="sigma_max=10"):
        sample(lambda x, s, c: x, noise, sigmas=sigmas, start=GaussianStart(stats, 10.0), **options)
    labelled = GaussianMixture([1.0] * 3, torch.zeros(3, *SHAPE), [0.1] * 3, labels=[0, 1, 2])
    with pytest.raises(ValueError, match="of 2 classes, but the denoiser is of 3"):
        sample(labelled, noise, sigmas=sigmas, start=GaussianStart(stats, 80.0), **options)
    with pytest.raises(ValueError, match=r"data \[2, 6, 5\]"):
        sample(lambda x, s, c: x, noise[:, :1], sigmas=sigmas, start=GaussianStart(stats, 80.0), **options)
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            GaussianStart(stats, sigma)
    with pytest.raises(ValueError, match="greater sigma_max"):
        GaussianStart(stats, 10.0, sigma_max=5.0)
    with pytest.raises(ValueError, match="afs must be"):
        make_solver("euler", afs="gauss")
    x = torch.randn(6, *SHAPE)
    for wrong in ({"form": "diagonal"}, {"rank": 3}, {"form": "low_rank"}, {"form": "low_rank", "rank": 60}):
        with pytest.raises(ValueError):
            GaussianStatistics.fit(x, **wrong)
    with pytest.raises(ValueError, match="class 2 has 0"):
        GaussianStatistics.fit(x, torch.arange(6) % 2, num_classes=3)
    with pytest.raises(ValueError, match="images"):
        GaussianStatistics.fit(x.flatten(1), form="fourier")
    with pytest.raises(ValueError, match="not finite"):
        GaussianStatistics.fit(x / 0)
