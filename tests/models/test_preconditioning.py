"""Each preconditioning in closed form: told the exact answer in its own terms, a network gives the exact denoiser."""

import math

import pytest
import torch
from torch import nn

from diffdistill.denoiser import per_sample
from diffdistill.models import GaussianMixture, NetworkDenoiser, make_preconditioning
from diffdistill.solvers.discrete_time import iddpm_table, linear_table, make_table, scaled_linear_table

SIGMA = torch.tensor([0.05, 0.7, 9.0], dtype=torch.float64)
DISCRETE = ["eps", "v", "x0", "iddpm"]


def vp_scale(sigma):
    return 1 / (1 + sigma**2).sqrt()


def edm_target(x, sigma, x0):
    """Karras et al. 2022, Eq. 8: the training target of the raw network."""
    return (x0 - 0.25 / (sigma**2 + 0.25) * x) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma)


TARGETS = {
    "edm": (edm_target, lambda x, s: x / (s**2 + 0.25).sqrt()),
    "ve": (lambda x, s, x0: (x0 - x) / s, lambda x, s: x),
    "vp": (lambda x, s, x0: (x - x0) / s, lambda x, s: x * vp_scale(s)),
    "iddpm": (lambda x, s, x0: (x - x0) / s, lambda x, s: x * vp_scale(s)),
    "eps": (lambda x, s, x0: (x - x0) / s, lambda x, s: x * vp_scale(s)),
    # v = alpha eps - sigma_vp x0, with alpha = 1 / sqrt(1 + s^2) and sigma_vp = s alpha.
    "v": (lambda x, s, x0: vp_scale(s) * (x - x0) / s - s * vp_scale(s) * x0, lambda x, s: x * vp_scale(s)),
    "x0": (lambda x, s, x0: x0, lambda x, s: x * vp_scale(s)),
    "flow": (lambda x, s, x0: (x - x0) / s - x0, lambda x, s: x / (1 + s)),
}


class Oracle(nn.Module):
    """The optimal network for a known denoiser, in the terms of one preconditioning."""

    def __init__(self, name, exact, x, sigma):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        target, scaled = TARGETS[name]
        s = per_sample(sigma, x)
        self.answer, self.expected_input = target(x, s, exact), scaled(x, s)

    def forward(self, x, noise_labels, class_labels, w):
        torch.testing.assert_close(x, self.expected_input, rtol=1e-12, atol=1e-12)
        self.noise_labels = noise_labels
        # Twice the channels, as networks have that predict a variance: the second half is of no interest.
        return torch.cat([self.answer, torch.full_like(self.answer, torch.nan)], dim=1)


@pytest.mark.parametrize("name", TARGETS)
def test_an_optimal_network_gives_the_exact_denoiser(name):
    torch.manual_seed(0)
    mixture = GaussianMixture([0.3, 0.7], torch.randn(2, 2, 5, 7), [0.1, 0.4])
    x = torch.randn(3, 2, 5, 7, dtype=torch.float64) * 2
    exact = mixture(x, SIGMA)
    oracle = Oracle(name, exact, x, SIGMA)
    denoiser = NetworkDenoiser(oracle, make_preconditioning(name), data_shape=(2, 5, 7), sigma_min=0.01, sigma_max=80.0)
    torch.testing.assert_close(denoiser(x, SIGMA), exact, rtol=1e-11, atol=1e-11)
    assert oracle.noise_labels.shape == (3,)


def test_noise_labels_in_closed_form():
    def c_noise(name, sigma, **options):
        return make_preconditioning(name, **options).c_noise(torch.tensor(sigma, dtype=torch.float64)).tolist()

    assert c_noise("edm", [math.e**2, 1.0]) == pytest.approx([0.5, 0.0])
    assert c_noise("edm", [math.e], time_scale=1000.0) == pytest.approx([250.0])
    assert c_noise("ve", [2 * math.e]) == pytest.approx([1.0])
    assert c_noise("flow", [1.0, 3.0]) == pytest.approx([500.0, 750.0])
    for t in (1e-5, 0.3, 1.0):
        sigma = math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t))
        assert c_noise("vp", [sigma]) == pytest.approx([999 * t], rel=1e-9)


def test_consistency_models_keep_their_input_at_the_boundary():
    edm = make_preconditioning("edm", boundary=0.002)
    sigma = torch.tensor([0.002], dtype=torch.float64)
    assert edm.c_skip(sigma).item() == 1.0 and edm.c_out(sigma).item() == 0.0
    # Song et al. 2023, Appendix C, at sigma = 0.3 with sigma_data = 0.5.
    above = torch.tensor([0.3], dtype=torch.float64)
    assert edm.c_skip(above).item() == pytest.approx(0.25 / (0.298**2 + 0.25))
    assert edm.c_out(above).item() == pytest.approx(0.5 * 0.298 / math.sqrt(0.09 + 0.25))


@pytest.mark.parametrize("name", DISCRETE)
def test_levels_of_the_table_have_their_index(name):
    table = iddpm_table() if name == "iddpm" else scaled_linear_table()
    index = torch.arange(len(table), dtype=torch.float64)
    smooth, rounded = (make_preconditioning(name, noise_level=how) for how in ("interpolate", "nearest"))
    torch.testing.assert_close(smooth.c_noise(table), index, rtol=0, atol=1e-6)
    assert torch.equal(rounded.c_noise(table), index)
    between = (table[3:5].log().mean().exp()).view(1)
    assert smooth.c_noise(between).item() == pytest.approx(3.5)
    # Rounding is in sigma, not in its logarithm: just above the geometric mean the lower level is still the nearest.
    assert rounded.c_noise(between * (1 + 1e-5)).item() == 3
    last = (table[-2:].log().mean().exp()).view(1)
    assert smooth.c_noise(last).item() == pytest.approx(len(table) - 1.5)
    ends = torch.tensor([1e-5, 1e6], dtype=torch.float64)
    assert smooth.c_noise(ends).tolist() == rounded.c_noise(ends).tolist() == [0.0, len(table) - 1.0]


def test_tables():
    for make in (scaled_linear_table, linear_table, iddpm_table):
        table = make()
        assert table.dtype == torch.float64 and len(table) == 1000 and (table.diff() > 0).all() and table[0] > 0
    assert scaled_linear_table()[[0, -1]].tolist() == pytest.approx([0.0292, 14.615], abs=1e-3)
    # The recurrence of the improved DDPM schedule (Karras et al. 2022, Table 1).
    u = [0.0]
    for j in range(1000, 0, -1):
        above, below = (math.sin(0.5 * math.pi * k / (1000 * 1.008)) ** 2 for k in (j, j - 1))
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(below / above, 0.001) - 1))
    assert iddpm_table().tolist() == pytest.approx(u[1:], rel=1e-9)
    with pytest.raises(ValueError, match="unknown table of noise levels 'cubic': choose one of iddpm, linear"):
        make_table("cubic")
    with pytest.raises(ValueError, match="positive, increasing"):
        make_table([1.0, 0.5])


@pytest.mark.parametrize("name", TARGETS)
def test_coefficients_differentiate_in_sigma(name):
    coefficients = make_preconditioning(name)
    sigma = torch.tensor([0.1234, 0.777, 7.89], dtype=torch.float64, requires_grad=True)
    for function in (coefficients.c_skip, coefficients.c_out, coefficients.c_in, coefficients.c_noise):
        out = function(sigma)
        assert out.shape == (3,) and out.dtype == torch.float64
        if out.requires_grad:
            assert torch.autograd.gradcheck(function, (sigma,))
    (slope,) = torch.autograd.grad(coefficients.c_noise(sigma).sum(), sigma)
    assert (slope > 0).all()


def test_constants_stay_in_float64_and_out_of_the_state():
    eps = make_preconditioning("eps").to(torch.bfloat16)
    assert eps.table.dtype == torch.float64 and not eps.state_dict()


def test_errors():
    with pytest.raises(ValueError, match="unknown preconditioning 'ddim': choose one of denoised, edm, eps"):
        make_preconditioning("ddim")
    with pytest.raises(TypeError, match="has no option 'sigma'"):
        make_preconditioning("edm", sigma=1.0)
    with pytest.raises(ValueError, match="noise_level must be one of interpolate, nearest"):
        make_preconditioning("eps", noise_level="round")
