"""Guidance as composition: the identity, exactness on a labelled mixture, and what passes through."""

import warnings

import pytest
import torch
from torch import nn

from diffdistill.models import ClassifierFreeGuidance, GaussianMixture, GuidanceConditioned, guidance_student, guided
from diffdistill.solvers import ProbabilityFlow
from tests.builders import tiny_denoiser

X, SIGMA = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 7.0])
LABELS = torch.tensor([0, 3, 1])


def labelled_mixture():
    return GaussianMixture([1, 2, 3, 1], torch.randn(4, 2, 8, 8), [0.1, 0.2, 0.3, 0.4], labels=[0, 1, 2, 3])


def test_without_weight_nothing_is_guided():
    denoiser = tiny_denoiser()
    for w in (0.0, torch.zeros(3)):
        both = ClassifierFreeGuidance(denoiser, w)(X, SIGMA, LABELS)
        torch.testing.assert_close(both, denoiser(X, SIGMA, LABELS), rtol=1e-5, atol=1e-6)
    exact = labelled_mixture()
    assert torch.equal(ClassifierFreeGuidance(exact, 0.0)(X, SIGMA, LABELS), exact(X, SIGMA, LABELS))


def test_guidance_is_the_formula_with_a_weight_per_sample():
    exact, w = labelled_mixture(), torch.tensor([0.0, 2.5, 4.0])
    expected = torch.stack(
        [
            (1 + w[i]) * exact(X[i : i + 1], SIGMA[i : i + 1], LABELS[i : i + 1])[0]
            - w[i] * exact(X[i : i + 1], SIGMA[i : i + 1])[0]
            for i in range(3)
        ]
    )
    torch.testing.assert_close(ClassifierFreeGuidance(exact, w)(X, SIGMA, LABELS), expected)
    with pytest.raises(ValueError, match="one value per sample"):
        ClassifierFreeGuidance(exact, torch.ones(2))(X, SIGMA, LABELS)


def test_one_batch_the_conditional_half_first():
    calls = []

    def denoiser(x, sigma, cond):
        calls.append((x.shape[0], sigma.shape[0], cond.tolist()))
        return x

    flow = ProbabilityFlow(ClassifierFreeGuidance(denoiser, 1.0), LABELS)
    flow(X, SIGMA)
    assert calls == [(6, 6, [0, 3, 1, -1, -1, -1])]
    assert flow.nfe == 2


def test_conditions_may_be_dicts_with_an_explicit_null():
    seen = {}

    def denoiser(x, sigma, cond):
        seen.update(cond)
        return x * cond["text"][:, :1, :1, None] + cond["size"].view(-1, 1, 1, 1)

    cond = {"text": torch.randn(3, 5, 4), "size": torch.tensor([1.0, 2.0, 3.0])}
    null = {"text": torch.zeros(1, 5, 4), "size": torch.tensor([1.0, 2.0, 3.0])}
    out = ClassifierFreeGuidance(denoiser, 2.0, null=null)(X, SIGMA, cond)
    assert seen["text"].shape == (6, 5, 4) and not seen["text"][3:].any()
    size = cond["size"].view(-1, 1, 1, 1)
    torch.testing.assert_close(out, 3 * (X * cond["text"][:, :1, :1, None] + size) - 2 * size)


@pytest.mark.parametrize("cond", [torch.randn(3, 5), {"text": torch.randn(3, 5)}], ids=["tensor", "dict"])
def test_a_condition_that_is_no_label_needs_an_explicit_null(cond):
    with pytest.raises(ValueError, match="say which condition carries no information, null="):
        ClassifierFreeGuidance(lambda x, sigma, cond: x, 1.0)(X, SIGMA, cond)


def test_a_denoiser_without_a_condition_is_not_guided():
    mixture = GaussianMixture([1.0], torch.zeros(1, 2, 8, 8), [0.1])
    with pytest.warns(UserWarning, match="takes no condition, so that no w guides it"):
        assert guided(mixture, 2.0) is mixture


def test_wrappers_forward_what_a_denoiser_states_and_change_nothing():
    denoiser = tiny_denoiser().eval()
    denoiser.sigma_max, before = 33.0, {k: v.clone() for k, v in denoiser.state_dict().items()}
    for wrapper in (ClassifierFreeGuidance(denoiser, 1.0), GuidanceConditioned(denoiser, 1.0)):
        assert wrapper.sigma_max == 33.0 and wrapper.data_shape == (2, 8, 8) and wrapper.num_classes == 4
        assert wrapper.sigma_min == 0.002 and wrapper.distilled is None and wrapper.w_range is None
        assert wrapper.bottleneck is denoiser.model.enc["4x4_block0"]
        with pytest.raises(ValueError, match="class label 4 is unknown"):
            wrapper.check_condition(torch.tensor([4]), 1)
    assert ClassifierFreeGuidance(ClassifierFreeGuidance(denoiser, 1.0), 1.0).cost == 4
    assert not denoiser.training
    assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())


def test_bound_weights_reach_the_network():
    student = guidance_student(tiny_denoiser(), (0.0, 4.0))
    nn.init.normal_(student.model.map_w.weight)
    w = torch.tensor([0.5, 3.0, 4.0])
    bound = GuidanceConditioned(student, w)
    assert bound.cost == 1
    torch.testing.assert_close(bound(X, SIGMA, LABELS), student(X, SIGMA, LABELS, w), rtol=0, atol=0)
    fixed = GuidanceConditioned(student, 3.0)(X, SIGMA, LABELS)
    torch.testing.assert_close(fixed[1], bound(X, SIGMA, LABELS)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        GuidanceConditioned(student, 0.0)(X, SIGMA, LABELS), student(X, SIGMA, LABELS), rtol=0, atol=0
    )


def test_guided_picks_the_way_and_warns_outside_the_range():
    teacher = tiny_denoiser()
    student = guidance_student(teacher, (0.0, 4.0))
    assert isinstance(guided(teacher, 1.0), ClassifierFreeGuidance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(guided(student, 4.0), GuidanceConditioned)
        guided(student, torch.tensor([0.0, 4.0]))
    with pytest.warns(UserWarning, match="w = 5 lies outside the trained range 0 to 4"):
        guided(student, 5)
    with pytest.warns(UserWarning, match="w = -1 lies outside"):
        guided(student, torch.tensor([-1.0, 2.0]))


def test_gradients_flow_to_the_network_and_the_weight():
    denoiser, w = tiny_denoiser(), torch.ones(3, requires_grad=True)
    ClassifierFreeGuidance(denoiser, w)(X, SIGMA, LABELS).square().sum().backward()
    assert (w.grad != 0).all()
    assert all(p.grad is not None for p in denoiser.parameters())


def test_a_denoiser_without_the_input_refuses_a_weight():
    with pytest.raises(ValueError, match="takes no guidance weight"):
        GuidanceConditioned(tiny_denoiser(), 1.0)(X, SIGMA, LABELS)
