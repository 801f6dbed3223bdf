"""How a model is sampled: the analytic start by its level, the schedules that fit it, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from diffdistill import load_denoiser, sample
from diffdistill.denoiser import Distilled, spread_labels
from diffdistill.models import guidance_student, guided, save_denoiser
from diffdistill.sampling.generation import count_nfe, generate, preview
from diffdistill.sampling.plans import WARM_UP_SAMPLES, plan, schedule_for, statistics_of
from diffdistill.solvers import (
    GaussianStart,
    GaussianStatistics,
    load_gaussian,
    make_schedule,
    make_solver,
    save_gaussian,
    seeded_noise,
)
from diffdistill.solvers.discrete_time import linear_table
from tests.builders import tiny_denoiser

SOLVER = {"name": "dpmpp", "order": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with statistics beside it, and one without."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_denoiser()
    save_denoiser(model, folder / "mine.safetensors")
    save_denoiser(model, folder / "other.safetensors")
    x = torch.randn(40, *model.data_shape, generator=torch.Generator().manual_seed(0))
    statistics = GaussianStatistics.fit(0.3 * x, torch.arange(40) % 4, num_classes=4)
    save_gaussian(statistics, folder / "mine.statistics.safetensors")
    return folder


@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_of_discrete_time_take_the_levels_of_the_model(zero_snr):
    table = torch.cat([linear_table(), torch.tensor([4096.0] * zero_snr, dtype=torch.float64)])
    model = SimpleNamespace(sigma_min=float(table[0]), sigma_max=float(table[-1]), table=table)
    found = schedule_for(model, {"name": "discrete", "num_steps": len(table) - 1})
    torch.testing.assert_close(found, table.flip(0), rtol=1e-9, atol=0)
    found = schedule_for(model, {"name": "trailing", "num_steps": len(table), "sigma_min": 0.0})
    torch.testing.assert_close(found[:-1], table.flip(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("w", [None, 1.5])
def test_a_start_is_that_of_the_statistics_beside_the_model(folder, w):
    model = load_denoiser(folder / "mine.safetensors")
    planned = plan(model, w=w, solver=SOLVER, schedule={"name": "polynomial", "rho": 5}, num_steps=3, start=7)
    assert planned.sigmas.tolist()[0] == 7 and count_nfe(planned) == (3 if w is None else 6)
    found = torch.cat(list(generate(planned, range(5), spread_labels(5, 4), batch_size=2)))
    expected = sample(
        model if w is None else guided(model, w),
        seeded_noise(range(5), model.data_shape),
        solver=make_solver(**SOLVER),
        sigmas=make_schedule("polynomial", num_steps=3, rho=5, sigma_min=0.002, sigma_max=7.0),
        cond=spread_labels(5, 4),
        start=GaussianStart(load_gaussian(folder / "mine.statistics.safetensors"), 7.0),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = sample(
        planned.denoiser,
        seeded_noise(range(5), model.data_shape),
        solver=planned.solver,
        sigmas=planned.sigmas,
        cond=spread_labels(5, 4),
    )
    assert (plain - expected).norm() > 0.01 * expected.norm()  # noise of that level is no start


def test_statistics_can_be_named(folder):
    model = load_denoiser(folder / "other.safetensors")
    start = {"sigma": 3.5, "statistics": folder / "mine.statistics.safetensors"}
    planned = plan(model, num_steps=2, start=start)
    assert planned.start is not None and planned.start.sigma == 3.5 and planned.sigmas.tolist()[0] == 3.5
    assert plan(load_denoiser("digits-teacher"), num_steps=2, start=3.5).start is not None
    guided_model = load_denoiser("digits-guided")
    planned = plan(guided_model, w=1.0, num_steps=2, start={"sigma": 3.5, "statistics": "digits-teacher"})
    assert count_nfe(planned) == 2


def test_where_statistics_lie(folder):
    assert statistics_of("digits-teacher") == "digits-teacher"
    assert statistics_of("models/edm.pkl") == "models/edm.statistics.safetensors"
    assert statistics_of(str(folder)) == str(folder / "model.statistics.safetensors")


def test_gits_chooses_levels_from_the_start_on(folder):
    model = load_denoiser(folder / "mine.safetensors")
    options = {"name": "gits", "fine_steps": 6}
    noise, labels = seeded_noise(range(2_000_000, 2_000_000 + WARM_UP_SAMPLES), model.data_shape), torch.arange(256) % 4
    for start, top in ((None, 80.0), (7.0, 7.0)):
        planned = plan(model, solver={"name": "ipndm"}, schedule=options, num_steps=3, start=start)
        assert planned.preparation_nfe == 256 * 6 and planned.sigmas[0] == top
        given = {"denoiser": model, "noise": noise, "cond": labels, "sigma_min": 0.002, "sigma_max": top}
        expected = make_schedule(**options, num_steps=3, start=planned.start, **given)
        assert torch.equal(planned.sigmas, expected)
        assert count_nfe(planned) == 3


def test_gits_under_a_start_walks_the_trajectories_of_the_start():
    """Where the data is one point and the start knows it, a jump from the start goes straight: one step is enough."""
    point = torch.full((1, 2, 3), 0.5)
    statistics = GaussianStatistics.fit(
        point + 1e-3 * torch.randn(50, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    )
    asked = []

    def denoiser(x, sigma, cond):
        asked.append((x, sigma))
        return point.expand_as(x)

    start = GaussianStart(statistics, 5.0, sigma_max=80.0)
    noise = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    make_schedule("gits", num_steps=2, sigma_min=0.01, sigma_max=5.0, denoiser=denoiser, noise=noise, start=start)
    x, sigma = asked[0]
    assert sigma.tolist() == [5.0] * 4
    torch.testing.assert_close(x, start.carry(80 * noise, 80.0, 5.0))
    assert (x - 5 * noise).norm() > 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": 90}, ValueError, r"start at sigma = 90 is not in the range of the model, 0.002 to 80"),
        ({"start": 0.001}, ValueError, "start at sigma = 0.001 is not in the range"),
        ({"start": float("nan")}, ValueError, "start at sigma = nan is not in the range"),
        ({"start": {"sgima": 3}}, TypeError, "a start is a noise level, or sigma and statistics"),
        ({"start": {"statistics": "digits-teacher"}}, TypeError, "a start is a noise level"),
        ({"start": {"sigma": 3, "statistics": "nope"}}, ValueError, "unknown Gaussian statistics 'nope'"),
        ({"start": {"sigma": 3, "statistics": "digits-teacher"}}, ValueError, r"are of \[1, 8, 8\] in 10 classes"),
        ({"start": 3, "schedule": {"name": "polynomial", "sigma_max": 80}}, ValueError, "leave out its sigma_max"),
        ({"start": 3, "solver": {"name": "learned", "predictor": "p"}}, ValueError, "leave out schedule and start"),
    ],
)
def test_bad_starts(folder, options, error, message):
    with pytest.raises(error, match=message):
        plan(load_denoiser(folder / "mine.safetensors"), num_steps=2, **options)


def test_a_model_without_statistics_says_how_to_make_them(folder):
    message = r"there is no '.*other.statistics.safetensors': make them with diffdistill gaussian-stats"
    with pytest.raises(ValueError, match=message):
        plan(load_denoiser(folder / "other.safetensors"), num_steps=2, start=3)


def test_a_student_takes_no_start():
    student = guidance_student(tiny_denoiser(), (0.0, 4.0))
    student.distilled = Distilled((80.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="leave out solver, schedule and start"):
        plan(student, w=1.0, start=3)


def test_latents_without_an_autoencoder_have_no_preview():
    latents, images = (tiny_denoiser(data_shape=[channels, 8, 8]) for channels in (2, 3))
    assert preview(latents, num_samples=5) is None
    drawn = preview(images, num_samples=5, num_steps=2)
    assert drawn is not None and drawn(images).shape == (5, 3, 8, 8)


def test_the_preview_of_a_student_of_one_w_has_that_w(recwarn):
    student = guidance_student(tiny_denoiser(data_shape=[3, 8, 8]), (2.0, 2.0))
    drawn = [draw(student) for draw in (preview(student, num_samples=5, num_steps=2, w=w) for w in (1.0, 2.0)) if draw]
    assert torch.equal(*drawn) and not recwarn.list
