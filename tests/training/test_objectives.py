"""What objectives are made of: weights, what is drawn, and the denoising loss itself."""

import math

import pytest
import torch
from scipy.stats import kstest, norm, uniform

from diffdistill.denoiser import NULL_LABEL, Denoiser
from diffdistill.training.denoising import Denoising
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.randomness import draw_w
from diffdistill.training.weighting import make_weighting

DRAWS = 5000


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("truncated_snr", [100.0, 1.0, 1.0]),
        ("snr_plus_one", [101.0, 2.0, 1.0625]),
        ("edm", [125.0, 26.0, 25.0625]),
        ("uniform", [1.0, 1.0, 1.0]),
    ],
)
def test_weights(name, expected):
    sigma = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    assert make_weighting(name, sigma_data=0.2)(sigma).tolist() == pytest.approx(expected)


def test_noise_levels_and_weights_have_their_distributions():
    low, high = math.atan(0.01), math.atan(50)
    angles = make_noise_levels("cosine", sigma_min=0.01, sigma_max=50.0)(DRAWS, generator()).atan()
    logs = make_noise_levels("lognormal", mean=-0.4, std=0.8)(DRAWS, generator()).log()
    w = draw_w((2.0, 14.0), DRAWS, generator())
    assert kstest(angles, uniform(low, high - low).cdf).pvalue > 0.01
    assert kstest(logs, norm(-0.4, 0.8).cdf).pvalue > 0.01
    assert kstest(w, uniform(2, 12).cdf).pvalue > 0.01
    levels = make_noise_levels("on_schedule", sigmas=[9.0, 2.0, 0.5, 0.0])(DRAWS, generator())
    values, counts = levels.unique(return_counts=True)
    assert values.tolist() == [0.5, 2.0, 9.0]
    assert (counts - DRAWS / 3).abs().max() < 4 * (DRAWS * 2 / 9) ** 0.5
    with pytest.raises(ValueError, match="no positive noise level"):
        make_noise_levels("on_schedule", sigmas=[0.0])


class Zero(Denoiser):
    """Answers 0 and keeps what it was asked."""

    num_classes = 3

    def forward(self, x, sigma, cond=None):
        self.seen = x, sigma, cond
        return torch.zeros_like(x)


def test_the_denoising_loss_drops_labels_at_its_rate():
    batch = {"x": 0.3 * torch.randn(DRAWS, 2, 3), "y": torch.arange(DRAWS) % 3}
    objective = Denoising(
        Zero(), noise_levels=make_noise_levels("lognormal"), weighting=make_weighting("edm"), label_dropout=0.2
    )
    value = objective.loss(batch, generator()).value
    noisy, sigma, labels = objective.trained.seen
    squares = batch["x"].double().square().flatten(1).mean(1)
    assert value.item() == pytest.approx(float(((sigma**-2 + 4) * squares).mean()), rel=1e-5)
    noise = (noisy - batch["x"]) / sigma.view(-1, 1, 1)
    assert noise.square().mean().item() == pytest.approx(1.0, abs=4 * (2 / noise.numel()) ** 0.5)
    dropped = labels == NULL_LABEL
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / DRAWS) ** 0.5)
    assert torch.equal(labels[~dropped], batch["y"][~dropped])
