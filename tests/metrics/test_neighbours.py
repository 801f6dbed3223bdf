import itertools

import pytest
import torch

from diffdistill.metrics import (
    compare_manifolds,
    density_coverage,
    measure_memorisation,
    nearest_distances,
    precision_recall,
)
from diffdistill.metrics.manifold import nearest, radii


def clouds(samples=23, real=31, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, size, generator=generator) * 1.3 + 0.4, torch.randn(real, size, generator=generator)


def ball_radii(points, k):
    return [sorted(float((p - q).norm()) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def inside(point, centres, reach):
    return [float((point - c).norm()) <= r for c, r in zip(centres, reach, strict=True)]


def test_all_four_match_the_definitions():
    samples, real = clouds()
    samples, real = samples.double(), real.double()
    k = 3
    of_real, of_samples = ball_radii(real, k), ball_radii(samples, k)
    hits = [inside(s, real, of_real) for s in samples]
    precision = sum(any(row) for row in hits) / 23
    recall = sum(any(inside(r, samples, of_samples)) for r in real) / 31
    assert precision_recall(samples, real, k=k) == pytest.approx((precision, recall), abs=1e-12)
    density = sum(map(sum, hits)) / (k * 23)
    coverage = sum(any(column) for column in zip(*hits, strict=True)) / 31
    assert density_coverage(samples, real, k=k) == pytest.approx((density, coverage), abs=1e-12)
    assert 0 < precision != recall < 1 and 0 < density != coverage < 1
    both = compare_manifolds(samples, real, k=3, k_coverage=3)
    assert (both.precision, both.recall, both.density, both.coverage) == pytest.approx(
        (precision, recall, density, coverage)
    )


def test_points_on_a_line():
    # Real points 0, 1, ... 9 have 1-balls of radius 1; the samples have radii 0.4, 0.4, 1, 1.
    real = torch.arange(10.0)[:, None]
    samples = torch.tensor([[0.5], [0.9], [100.0], [101.0]])
    assert precision_recall(samples, real, k=1) == pytest.approx((2 / 4, 1 / 10))
    # 0.5 and 0.9 both lie in the balls of 0 and 1, and in no other.
    assert density_coverage(samples, real, k=1) == pytest.approx((4 / 4, 2 / 10))


def test_equal_sets_are_covered_entirely():
    _, real = clouds()
    result = compare_manifolds(real, real)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)


def test_chunks_change_nothing(monkeypatch):
    samples, real = clouds()
    whole = compare_manifolds(samples, real), nearest(samples, real)
    monkeypatch.setattr("diffdistill.metrics.manifold._CHUNK", 4)
    parts = compare_manifolds(samples, real), nearest(samples, real)
    assert whole[0] == parts[0]
    assert all(torch.equal(a, b) for a, b in zip(whole[1], parts[1], strict=True))


def test_nearest_and_radii_match_a_loop():
    samples, real = clouds(samples=30, real=40)
    samples, real = samples.double(), real.double()
    index, distance = nearest(samples, real)
    for i, j in itertools.product(range(30), range(40)):
        assert float((samples[i] - real[j]).norm()) >= float(distance[i]) - 1e-12
    torch.testing.assert_close(distance, (samples - real[index]).norm(dim=1))
    assert radii(real, 2).tolist() == pytest.approx(ball_radii(real, 2), abs=1e-9)


def test_copies_are_at_distance_zero_and_a_shift_at_its_length():
    training = torch.rand(40, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert nearest_distances(training[[4, 2]], training).tolist() == [0, 0]
    moved = training[[4, 2]].clone()
    moved[:, 1, 2, 3] += 0.25
    assert nearest_distances(moved, training).tolist() == pytest.approx([0.25, 0.25], rel=1e-6)


def test_nearer_than_95_percent_of_the_unseen():
    """Unseen images at the distances 1 to 101 put the threshold at 6."""
    training, unseen = torch.zeros(1, 1, 1, 1), torch.arange(1.0, 102.0).view(-1, 1, 1, 1)
    measured = measure_memorisation(unseen[:10], training, unseen)
    assert (measured.closer_share, measured.unseen_median) == (0.5, 51)


def test_memorisation_tells_copies_from_new_images():
    generator = torch.Generator().manual_seed(1)
    training, unseen, fresh = (torch.randn(n, 1, 4, 5, generator=generator) for n in (300, 200, 400))
    copied = measure_memorisation(training[:50], training, unseen)
    assert (copied.samples_median, copied.ratio, copied.closer_share) == (0, 0, 1)
    for reference in (unseen, None):
        new = measure_memorisation(fresh, training, reference)
        assert new.ratio == pytest.approx(1, abs=0.05)
        assert new.closer_share == pytest.approx(0.05, abs=0.04)
    # Half copies: half of the samples are nearer than nearly all unseen images.
    half = measure_memorisation(torch.cat([training[:200], fresh[:200]]), training, unseen)
    assert half.closer_share == pytest.approx(0.525, abs=0.03)


def test_too_few_points_and_other_sizes():
    samples, real = clouds()
    with pytest.raises(ValueError, match="k=3 neighbours need more than 3 points"):
        precision_recall(samples[:3], real)
    with pytest.raises(ValueError, match=r"not \[23, 4\] and \[31, 3\]"):
        density_coverage(samples, real[:, :3])
