"""The published predictor against the published numbers, the tables, the feature tap, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffdistill.models import ClassifierFreeGuidance, GaussianMixture
from diffdistill.solvers import (
    AMEDPlugin,
    AMEDPredictor,
    Correction,
    FeatureTap,
    LearnedTable,
    ProbabilityFlow,
    TabulatedPredictor,
    intervals,
    make_schedule,
    make_solver,
    sample,
)
from diffdistill.solvers.amed import LinearTable
from tests.builders import tiny_denoiser

SIGMAS = make_schedule([40.0, 3.0, 0.2])


def published():
    with np.load(Path(__file__).parents[2] / "data" / "predictor.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data}


def test_forward_pass_and_parameter_names_are_the_published_ones():
    data = published()
    predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2)
    predictor.load_state_dict({key: value for key, value in data.items() if "." in key}, strict=True)
    features = data["features"]
    sigma, sigma_next = (data[key].expand(len(features)) for key in ("sigma", "sigma_next"))
    correction = predictor(features, sigma, sigma_next)
    for name in ("r", "scale_dir", "scale_time"):
        value = getattr(correction, name)
        assert value.shape == (len(features),)
        torch.testing.assert_close(value, data[name][:, 0].double(), rtol=0, atol=1e-6)
    # the same numbers from activations with channels, whose mean is the features
    channels = torch.randn(len(features), 3, 8, 8)
    channels += (features - channels.mean(1))[:, None]
    torch.testing.assert_close(predictor(channels, sigma, sigma_next).r, correction.r, rtol=0, atol=1e-6)


def test_autocast_leaves_the_predictor_alone():
    predictor, features, sigma = (
        AMEDPredictor(initial="published"),
        torch.randn(3, 5, 8, 8),
        torch.tensor([40.0, 3.0, 0.2]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = predictor(features, sigma, sigma / 2)
    assert torch.equal(half.r, predictor(features, sigma, sigma / 2).r)


def test_sizes_and_bounds():
    assert sum(p.numel() for p in AMEDPredictor(0, 0).parameters()) == 8929
    assert sum(p.numel() for p in AMEDPredictor(0.01, 0.2).parameters()) == 8929 + 2 * 21
    only_r = AMEDPredictor(0, 0)(None, torch.ones(3), torch.ones(3))
    assert only_r.scale_dir is None and only_r.scale_time is None and only_r.scale_first is None
    predictor = AMEDPredictor(0.25, 0.5)
    with torch.no_grad():
        predictor.fc_scale_dir.bias.fill_(1e3)
        predictor.fc_scale_time.bias.fill_(-1e3)
    correction = predictor(None, torch.ones(3), torch.ones(3))
    assert correction.scale_dir.tolist() == [1.25] * 3 and correction.scale_time.tolist() == [0.5] * 3


def test_initialisation_is_the_published_one():
    many = [AMEDPredictor(initial="published") for _ in range(60)]

    def std(name):
        return torch.cat([m.get_parameter(name).detach().flatten() for m in many]).std().item()

    for name, expected in {
        "enc_layer0": 1 / 8,
        "enc_layer1": 128**-0.5,
        "fc_r": 20**-0.5,
        "map_layer0": 8**-0.5,
    }.items():
        assert std(f"{name}.weight") == pytest.approx(expected, rel=0.1)
        assert not torch.cat([m.get_parameter(f"{name}.bias") for m in many]).any()
    assert max(m.map_layer0.weight.abs().max().item() for m in many) <= (6 / 16) ** 0.5


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (5, 7), (1, 1)])
def test_features_of_any_size(size):
    predictor = AMEDPredictor(initial="published")
    sigma = torch.tensor([3.0, 2.0, 1.0])
    features = torch.randn(3, 6, *size)
    correction = predictor(features, sigma, sigma / 2)
    flat = features.mean(1)
    if size == (4, 4):
        expected = flat.repeat_interleave(2, 1).repeat_interleave(2, 2)
    elif size == (16, 16):
        expected = flat.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    else:
        expected = torch.nn.functional.adaptive_avg_pool2d(flat, 8)
    torch.testing.assert_close(correction.r, predictor(expected, sigma, sigma / 2).r)
    alone = torch.cat([predictor(features[i : i + 1], sigma[i : i + 1], sigma[i : i + 1] / 2).r for i in range(3)])
    torch.testing.assert_close(correction.r, alone)


def test_the_tap_follows_every_evaluation_and_leaves_nothing_behind():
    denoiser = tiny_denoiser()
    seen = []

    def predictor(features, sigma, sigma_next):
        seen.append(features)
        return Correction(r=torch.full_like(sigma, 0.5))

    noise, cond = torch.randn(3, *denoiser.data_shape), torch.tensor([0, 1, 2])
    solver = AMEDPlugin(make_solver("dpmpp", afs=True), predictor)
    run = sample(denoiser, noise, solver=solver, sigmas=SIGMAS, cond=cond, return_trajectory=True)
    assert seen[0] is None and seen[1].shape[0] == 3 and run.nfe == 3
    expected = []
    hook = denoiser.bottleneck.register_forward_hook(lambda m, a, out: expected.append(out.detach()))
    with torch.no_grad():
        denoiser(run.x[1], torch.full((3,), 3.0).double(), cond)
    hook.remove()
    torch.testing.assert_close(seen[1], expected[0])
    assert not denoiser.bottleneck._forward_hooks


def test_the_conditional_half_is_read_under_guidance():
    denoiser = tiny_denoiser()
    noise, cond = torch.randn(3, *denoiser.data_shape), torch.tensor([0, 1, 2])
    interval = intervals(SIGMAS, 3)[0]
    evaluations = []
    for d in (denoiser, ClassifierFreeGuidance(denoiser, 2.0)):
        with FeatureTap(d.bottleneck) as tap, torch.no_grad():
            evaluations.append(ProbabilityFlow(d, cond, features=tap)(noise * 40, interval.sigma))
    torch.testing.assert_close(evaluations[0].features, evaluations[1].features)
    assert not torch.allclose(evaluations[0].denoised, evaluations[1].denoised)


def test_learned_table_starts_neutral_and_stays_within_its_bounds():
    table = LearnedTable(2, scale_dir=0.1, scale_time=0.0, scale_first=0.3)
    interval = intervals(SIGMAS, 3)[1]
    correction = table.correction(None, interval)
    assert correction.r.tolist() == [0.5] * 3 and correction.scale_time is None
    assert correction.scale_dir.tolist() == [1.0] * 3 and correction.scale_first.tolist() == [1.0] * 3
    with torch.no_grad():
        table.logit_scale_dir[1] = 100.0
    assert table.correction(None, interval).scale_dir.tolist() == [1.1] * 3
    assert table.correction(None, intervals(SIGMAS, 3)[0]).scale_dir.tolist() == [1.0] * 3


def test_bad_input():
    for bound in (-0.1, 1.0, 1.5):
        for build in (AMEDPredictor, lambda *a: LearnedTable(2, scale_dir=a[0], scale_time=a[1])):
            with pytest.raises(ValueError, match=r"\[0, 1\)"):
                build(bound, 0.0)
            with pytest.raises(ValueError, match=r"\[0, 1\)"):
                build(0.0, bound)
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            LearnedTable(count)
    for empty in (None, []):
        with pytest.raises(ValueError, match="a row for each interval in one of r, scale_dir, scale_time, scale_first"):
            TabulatedPredictor(empty)
    with pytest.raises(ValueError, match="shape"):
        TabulatedPredictor([0.5, 0.5], scale_dir=[1.0])
    with pytest.raises(ValueError, match="between 0 and"):
        TabulatedPredictor([0.5, 1.5])
    for build in (AMEDPredictor, lambda **o: LearnedTable(3, **o)):
        for wrong in (0.0, 1.0, [0.5, 1.5], [], [[0.5] * 3]):
            with pytest.raises(ValueError, match="initial_r must lie in"):
                build(initial_r=wrong)
    with pytest.raises(ValueError, match="initial_r has 2 numbers, but there are 3 intervals"):
        LearnedTable(3, initial_r=[0.5, 0.5])
    with pytest.raises(ValueError, match="neutral, published"):
        AMEDPredictor(initial="zero")
    with pytest.raises(ValueError, match="call correction"):
        AMEDPredictor(initial_r=[0.5, 0.4])(None, torch.ones(3), torch.ones(3))
    for options, message in (
        ({"lags": 4}, "no more than 3 answers"),
        ({"lags": 1, "sum_to_zero": True}, "lags must be an integer of at least 2"),
        ({"lags": 0}, "lags must be an integer of at least 1"),
        ({"weight_rate": 0.0}, "weight_rate must be positive"),
        ({"scale_time": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearTable(3, **options)
    with pytest.raises(ValueError, match="features"):
        AMEDPredictor()(torch.randn(3), torch.ones(3), torch.ones(3))


def test_a_table_may_leave_r_as_published():
    mixture = GaussianMixture(weights=[1.0], means=torch.zeros(1, 2, 5, 7), variances=[0.3])
    noise = torch.randn(3, 2, 5, 7)
    scales = torch.tensor([[0.9, 1.0, 1.1], [1.2, 0.8, 1.0]])
    left_out, given = (
        sample(
            mixture,
            noise,
            solver=AMEDPlugin(make_solver("euler"), TabulatedPredictor(r, scale_dir=scales)),
            sigmas=SIGMAS,
        )
        for r in (None, [0.5, 0.5])
    )
    assert torch.equal(left_out, given)


def test_a_table_of_another_length_is_refused():
    mixture = GaussianMixture(weights=[1.0], means=torch.zeros(1, 2, 5, 7), variances=[0.3])
    noise = torch.randn(3, 2, 5, 7)
    for rows in (1, 2, 5):
        solver = AMEDPlugin(make_solver("euler"), TabulatedPredictor([0.5] * rows))
        with pytest.raises(ValueError, match=f"for {rows} intervals, but the schedule has 4"):
            sample(mixture, noise, solver=solver, sigmas=make_schedule([9.0, 4.0, 2.0, 1.0, 0.5]))
    solver = AMEDPlugin(make_solver("euler"), TabulatedPredictor(torch.full((2, 4), 0.5)))
    with pytest.raises(ValueError, match="4 samples, but the batch has 3"):
        sample(mixture, noise, solver=solver, sigmas=SIGMAS)


def test_a_network_without_a_bottleneck_is_refused_by_predictors_that_read_it():
    mixture = GaussianMixture(weights=[1.0], means=torch.zeros(1, 2, 5, 7), variances=[0.3])
    solver = make_solver("amed", predictor=AMEDPredictor(), afs=True)
    with pytest.raises(ValueError, match="no bottleneck"):
        sample(mixture, torch.randn(3, 2, 5, 7), solver=solver, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="FeatureTap"):
        make_solver("amed", predictor=AMEDPredictor()).step(
            ProbabilityFlow(mixture), torch.randn(3, 2, 5, 7), intervals(SIGMAS, 3)[0]
        )
    with pytest.raises(TypeError, match="predictor"):
        make_solver("amed", predicter=AMEDPredictor())
