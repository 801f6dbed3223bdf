"""The mixture against the log-density that it follows from, and at the ends of its range."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.models import GaussianMixture

WEIGHTS, VARIANCES = [0.2, 0.5, 1.3], [0.05, 0.3, 0.0]
LABELS = [0, 1, 0]


def mixture(labels=None):
    torch.manual_seed(0)
    return GaussianMixture(WEIGHTS, torch.randn(3, 2, 3, 5), VARIANCES, labels)


def log_density(m, x, sigma, keep=(0, 1, 2)):
    keep = list(keep)
    scale = (m.variances[keep] + sigma**2).sqrt()[:, None].expand(-1, 30)
    components = Independent(Normal(m.means[keep].flatten(1), scale), 1)
    return MixtureSameFamily(Categorical(logits=m.log_weights[keep]), components).log_prob(x.flatten(1))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 20.0])
def test_denoised_is_x_plus_the_variance_times_the_score(sigma):
    m = mixture(LABELS)
    x = (m.sample_data(4) + sigma * torch.randn(4, 2, 3, 5, dtype=torch.float64)).requires_grad_()
    for cond, keep in ((None, (0, 1, 2)), (0, (0, 2)), (1, (1,))):
        (score,) = torch.autograd.grad(log_density(m, x, sigma, keep).sum(), x)
        labels = None if cond is None else torch.full((4,), cond)
        denoised = m(x, torch.full((4,), sigma, dtype=torch.float64), labels)
        torch.testing.assert_close(denoised, x + sigma**2 * score, rtol=1e-9, atol=1e-9)


def test_sigma_and_labels_are_per_sample():
    m = mixture(LABELS)
    x, sigma = torch.randn(4, 2, 3, 5, dtype=torch.float64), torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    labels = torch.tensor([0, -1, 1, 0])
    whole = m(x, sigma, labels)
    parts = [m(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts))
    torch.testing.assert_close(whole[1], m(x, sigma)[1])
    with pytest.raises(ValueError, match="one value per sample"):
        m(x, sigma[:1])


def test_the_ends_of_the_range():
    m = mixture()
    x = m.means + 0.01
    # Far from all means, where every weight underflows, the noise is still nothing beside the components' widths.
    torch.testing.assert_close(m(1e4 * x, torch.full((3,), 1e-3)), 1e4 * x, rtol=2e-5, atol=1e-3)
    # Points: close to one, its own place is the answer, however small sigma.
    points = GaussianMixture([1, 1, 1], m.means, [0, 0, 0])
    torch.testing.assert_close(points(x, torch.full((3,), 1e-6)), m.means)
    wide = GaussianMixture(WEIGHTS, m.means, [0.1, 0.2, 0.3])
    torch.testing.assert_close(wide(x, torch.zeros(3)), x)
    mean = torch.einsum("k,kchw->chw", wide.log_weights.exp(), wide.means)
    torch.testing.assert_close(wide(x, torch.full((3,), 1e6)), mean.expand(3, -1, -1, -1), rtol=0, atol=1e-3)


def test_gradients():
    m = mixture(LABELS)
    x, sigma = torch.randn(2, 2, 3, 5, dtype=torch.float64), torch.tensor([0.6, 1.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(m, (x.requires_grad_(), sigma.requires_grad_(), torch.tensor([0, 1])))


def by_differences(m, x, sigma):
    """The denoiser by its formula, from the differences of all pairs: `[B, K, D]`."""
    points, means, noise = x.flatten(1), m.means.flatten(1), sigma[:, None] ** 2
    variance = m.variances + noise
    squared = (points[:, None] - means).square().sum(2)
    p = (m.log_weights - squared / (2 * variance) - variance.log() * (points.shape[1] / 2)).softmax(1)
    return ((p * m.variances / variance).sum(1, keepdim=True) * points + (p * noise / variance) @ means).view(x.shape)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_products_give_what_differences_of_all_pairs_give(offset):
    torch.manual_seed(4)
    m = GaussianMixture(torch.rand(50) + 0.1, torch.randn(50, 3, 7, 5) + offset, 0.1 * torch.rand(50))
    sigma = torch.logspace(-2.7, 1.9, 11, dtype=torch.float64).requires_grad_()
    x = m.sample_data(11) + sigma.detach().view(-1, 1, 1, 1) * torch.randn(11, 3, 7, 5, dtype=torch.float64)
    x.requires_grad_()
    tolerance = {"rtol": 1e-11, "atol": 1e-11 * max(1.0, offset)}
    torch.testing.assert_close(m(x, sigma), by_differences(m, x, sigma), **tolerance)
    v = torch.randn(11, 3, 7, 5, dtype=torch.float64)
    for mine, plain in zip(
        *(torch.autograd.grad((f * v).sum(), (x, sigma)) for f in (m(x, sigma), by_differences(m, x, sigma))),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-7, atol=1e-7)
    primal, tangents = (x.detach(), sigma.detach()), (v, sigma.detach())
    _, slope = torch.func.jvp(lambda x, sigma: m(x, sigma), primal, tangents)
    _, plain = torch.func.jvp(lambda x, sigma: by_differences(m, x, sigma), primal, tangents)
    torch.testing.assert_close(slope, plain, rtol=1e-7, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m(x, sigma), m(x.detach(), sigma.detach()))


def test_no_tensor_of_all_pairs_and_dimensions_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    m = GaussianMixture(torch.ones(60), torch.randn(60, 3, 5, 7), torch.ones(60))
    with Largest() as largest:
        m(torch.randn(40, 3, 5, 7), torch.ones(40))
    assert largest.elements == 60 * 105


def test_sampled_data_has_the_stated_moments():
    m = mixture(LABELS)
    x = m.sample_data(20_000, generator=torch.Generator().manual_seed(1))
    weights = m.log_weights.exp()
    mean = torch.einsum("k,kchw->chw", weights, m.means)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    spread = (x - mean).square().mean().sqrt().item()
    assert spread == pytest.approx(m.sigma_data, rel=0.01)
    one = m.sample_data(4_000, cond=torch.ones(4_000, dtype=torch.long))
    torch.testing.assert_close(one.mean(0), m.means[1], rtol=0, atol=0.05)
    assert one.std(0).mean().item() == pytest.approx(0.3**0.5, rel=0.02)


def test_float64_inside_float32_outside():
    m = mixture()
    x, sigma = torch.randn(3, 2, 3, 5), torch.rand(3)
    out = m.float()(x, sigma)
    assert out.dtype == torch.float32 and m.means.dtype == torch.float64
    torch.testing.assert_close(out.double(), m(x.double(), sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1, 1]}, r"3 means need 3 weights and variances, not \[2\] and \[3\]"),
        ({"weights": [1, 1, 0]}, "weights must be positive, but the least is 0"),
        ({"variances": [1, 1, -2]}, "variances must not be negative, but the least is -2"),
        ({"labels": [0, 2, 2]}, r"each class from 0 on needs a component, but the labels are \[0, 2, 2\]"),
        ({"labels": [0, 1]}, r"3 components need 3 labels, not \[2\]"),
    ],
)
def test_errors(change, message):
    arguments = {"weights": WEIGHTS, "means": torch.zeros(3, 4), "variances": VARIANCES}
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{**arguments, **change})


def test_no_component_and_data_of_another_shape():
    with pytest.raises(ValueError, match="at least one component"):
        GaussianMixture([], torch.zeros(0, 4), [])
    with pytest.raises(ValueError, match=r"of data \[2, 3, 5\], not \[2, 5, 3\]"):
        mixture()(torch.randn(4, 2, 5, 3), torch.ones(4))


def test_labels_need_a_labelled_mixture():
    with pytest.raises(ValueError, match="no class labels"):
        mixture()(torch.randn(1, 2, 3, 5), torch.ones(1), torch.zeros(1, dtype=torch.long))
