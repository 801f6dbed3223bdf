import numpy as np
import pytest
import scipy.linalg
import torch

from diffdistill.metrics import FeatureStatistics, Gaussian, frechet_distance, load_statistics, save_statistics
from diffdistill.metrics.frechet import symmetric_root


def random_gaussian(seed, size=7, rank=None):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or size + 3, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(size, generator=generator, dtype=torch.float64), factor @ factor.T / size)


def rotation(size, seed=3):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q


def test_diagonal_covariances():
    mean_a, mean_b = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    std_a, std_b = torch.tensor([[1.0, 2, 3, 0.5, 0], [2.0, 1, 0, 0.1, 4]]).double()
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    a, b = Gaussian(mean_a, std_a.square().diag()), Gaussian(mean_b, std_b.square().diag())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)
    # A common rotation makes the two commute and changes nothing.
    q = rotation(5)
    turned = [Gaussian(q @ g.mean, q @ g.covariance @ q.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-7)


def test_non_commuting_covariances_match_the_matrix_root():
    a, b = random_gaussian(0), random_gaussian(1)
    assert float((a.covariance @ b.covariance - b.covariance @ a.covariance).abs().max()) > 0.1
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    trace = float(a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root).real
    expected = float((a.mean - b.mean).square().sum()) + trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_two_by_two_closed_form():
    # tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2 matrices (Cayley and Hamilton).
    a, b = random_gaussian(2, size=2), random_gaussian(3, size=2)
    product = a.covariance @ b.covariance
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_singular_covariances():
    a = random_gaussian(4, size=40, rank=3)
    assert 0 <= frechet_distance(a, a) < 1e-10
    # Rank 1 against rank 1 along orthogonal directions: the traces add up.
    e = torch.eye(6, dtype=torch.float64)
    a, b = Gaussian(e[0] * 0, 4 * torch.outer(e[1], e[1])), Gaussian(e[0], 9 * torch.outer(e[2], e[2]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 9, abs=1e-12)


def test_the_symmetric_root_squares_to_the_matrix():
    covariance = random_gaussian(5).covariance
    root = symmetric_root(covariance)
    torch.testing.assert_close(root @ root, covariance)
    torch.testing.assert_close(root, root.T)


def features(seed=0, count=61, size=5, offset=1e4):
    # Far from zero, where E[x^2] - E[x]^2 in float32 would lose everything.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * torch.arange(1, size + 1) + offset


@pytest.mark.parametrize("parts", [[61], [1] * 61, [20, 0, 41], [60, 1]])
def test_streaming_equals_one_pass(parts):
    x = features()
    statistics = FeatureStatistics()
    for part in x.split(parts):
        statistics.update(part)
    assert statistics.count == 61
    np.testing.assert_allclose(statistics.mean, x.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_shards_merge_to_one_pass_and_stay_as_they_are():
    x = features()
    whole = FeatureStatistics().update(x)
    shards = [FeatureStatistics().update(x[i::3]) for i in range(3)]
    before = shards[1].covariance.clone()
    merged = FeatureStatistics()
    for shard in [FeatureStatistics(), *shards]:
        merged.merge(shard)
    assert merged.count == 61
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-10)
    merged.update(features(1))
    torch.testing.assert_close(shards[1].covariance, before, rtol=0, atol=0)
    torch.testing.assert_close(shards[0].covariance, FeatureStatistics().update(x[0::3]).covariance, rtol=0, atol=0)


def test_gaussian_features_approach_the_exact_distance():
    a, b = random_gaussian(6), random_gaussian(7)
    fitted = []
    for seed, g in enumerate((a, b)):
        n = torch.randn(200_000, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fitted.append(FeatureStatistics().update(g.mean + n @ symmetric_root(g.covariance)).gaussian())
    assert frechet_distance(*fitted) == pytest.approx(frechet_distance(a, b), rel=0.01)


def test_errors_and_warnings():
    with pytest.raises(ValueError, match="statistics of 7 features cannot be compared with those of 5"):
        frechet_distance(random_gaussian(0), random_gaussian(0, size=5))
    with pytest.raises(ValueError, match=r"mean \[7\] holds values that are not finite"):
        frechet_distance(random_gaussian(0), Gaussian(torch.full((7,), float("nan")), torch.eye(7)))
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics().update(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"\[B, D\], not \[3\]"):
        FeatureStatistics().update(torch.zeros(3))
    with pytest.raises(ValueError, match="expected 5 features per sample, not 6"):
        FeatureStatistics().update(features()).update(features(size=6))
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        FeatureStatistics().update(features(count=1)).gaussian()
    with pytest.raises(ValueError, match="no features seen"):
        _ = FeatureStatistics().mean
    with pytest.warns(UserWarning, match="5 samples .* of 5 features singular: take at least 6"):
        FeatureStatistics().update(features(count=5)).gaussian()


def test_statistics_files(tmp_path):
    original = FeatureStatistics().update(features()).gaussian()
    save_statistics(original, tmp_path / "ours.npz", features="pixels")
    again = load_statistics(tmp_path / "ours.npz")
    assert torch.equal(again.mean, original.mean) and torch.equal(again.covariance, original.covariance)
    assert again.count == 61
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["count", "features", "mu", "sigma"] and str(file["features"]) == "pixels"


def test_files_of_edm_and_adm(tmp_path):
    mu, sigma = np.arange(3.0, dtype=np.float32), np.eye(3) * 2
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    adm = {"mu_s": np.ones(4), "sigma_s": np.eye(4), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, **adm)
    for name in ("edm.npz", "adm.npz"):
        read = load_statistics(tmp_path / name)
        assert read.mean.tolist() == [0, 1, 2] and read.covariance.dtype == torch.float64 and read.count is None
        assert torch.equal(read.covariance, 2 * torch.eye(3).double())
    assert load_statistics(tmp_path / "adm.npz", spatial=True).mean.tolist() == [1] * 4
    with pytest.raises(ValueError, match="has no mu_s or sigma_s: it holds mu, sigma"):
        load_statistics(tmp_path / "edm.npz", spatial=True)


def test_unreadable_statistics_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference statistics at"):
        load_statistics(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        load_statistics(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_statistics(tmp_path / "pickled.npz")
    np.savez(tmp_path / "mismatch.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"not \[3\] and \[4, 4\]"):
        load_statistics(tmp_path / "mismatch.npz")
