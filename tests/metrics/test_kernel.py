import itertools
import math

import numpy as np
import pytest
import torch

from diffdistill.metrics import inception_score, kernel_distance, polynomial_mmd


def cloud(count, size, seed, shift=0.0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_the_unbiased_estimate_matches_its_double_sum():
    x, y = cloud(5, 3, 0).tolist(), cloud(7, 3, 1).tolist()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = [sum(k(a, b) for a, b in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1)) for s in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / 35
    expected = within[0] + within[1] - 2 * across
    assert polynomial_mmd(torch.tensor(x).double(), torch.tensor(y).double()) == pytest.approx(expected, rel=1e-5)
    assert polynomial_mmd(cloud(5, 3, 0), cloud(7, 3, 1)) == pytest.approx(expected, rel=1e-12)


def test_a_linear_kernel_estimates_the_distance_of_the_means():
    # With degree 1 the squared discrepancy is |m_x - m_y|^2 / D.
    values = [polynomial_mmd(cloud(50, 4, i, 1.0), cloud(60, 4, 1000 + i), degree=1) for i in range(200)]
    assert np.mean(values) == pytest.approx(1.0, abs=3 * np.std(values) / math.sqrt(200))
    equal = [polynomial_mmd(cloud(50, 4, i), cloud(60, 4, 1000 + i)) for i in range(200)]
    assert np.mean(equal) == pytest.approx(0.0, abs=3 * np.std(equal) / math.sqrt(200))
    assert min(equal) < 0


def test_subsets_are_those_of_the_published_convention():
    x, y = cloud(30, 3, 0), cloud(40, 3, 1, 0.3)
    stream = np.random.RandomState(7)
    values = []
    for _ in range(6):
        rows_x = stream.choice(30, 12, replace=False)
        rows_y = stream.choice(40, 12, replace=False)
        values.append(polynomial_mmd(x[rows_x], y[rows_y]))
    estimate = kernel_distance(x, y, subsets=6, subset_size=12, seed=7)
    assert (estimate.mean, estimate.std) == pytest.approx((np.mean(values), np.std(values)), rel=1e-12)
    assert kernel_distance(x, y, subsets=6, subset_size=12, seed=8) != estimate
    # A subset of everything is everything.
    whole = kernel_distance(x, y[:30], subsets=2, subset_size=30)
    assert whole.mean == pytest.approx(polynomial_mmd(x, y[:30])) and whole.std < 1e-12


def test_the_inception_score_of_certain_and_of_ignorant_answers():
    certain = torch.full((60, 6), -math.inf)
    certain[torch.arange(60), torch.arange(60) % 6] = 0.0
    score = inception_score(certain, splits=5, seed=None)
    assert (score.mean, score.std) == pytest.approx((6, 0))
    assert inception_score(torch.zeros(60, 6)).mean == pytest.approx(1)


def test_the_inception_score_matches_its_definition():
    logits = 2 * cloud(23, 4, 0)
    shuffled = logits.numpy()[np.random.RandomState(2020).permutation(23)]
    scores = []
    for part in (shuffled[:7], shuffled[7:15], shuffled[15:]):
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))
    estimate = inception_score(logits, splits=3)
    assert (estimate.mean, estimate.std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    log_p = logits.log_softmax(dim=1)
    assert inception_score(log_p, splits=3).mean == pytest.approx(estimate.mean, rel=1e-12)


def test_arguments_out_of_range():
    x = cloud(5, 3, 0)
    with pytest.raises(ValueError, match="subset_size=6 is more than the 5 samples"):
        kernel_distance(x, x, subset_size=6)
    with pytest.raises(ValueError, match="size 3 cannot be compared with features of size 2"):
        polynomial_mmd(x, x[:, :2])
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        polynomial_mmd(x[:1], x)
    with pytest.raises(ValueError, match="splits=6 is outside 1 to 5"):
        inception_score(x, splits=6)
