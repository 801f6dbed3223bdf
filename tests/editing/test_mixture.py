"""Editing with exact denoisers: what holds exactly, and what converges."""

import pytest
import torch

from diffdistill.editing import Known, encode, image_to_image, inpaint, noised, style_transfer
from diffdistill.editing.image_to_image import Start, run
from diffdistill.models import GaussianMixture
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import make_schedule, make_solver, sample, seeded_noise

SHAPE = (2, 5, 7)


@pytest.fixture
def mixture():
    means = torch.stack([torch.full(SHAPE, -0.6), torch.full(SHAPE, 0.5)])
    return GaussianMixture(weights=[0.5, 0.5], means=means, variances=[0.04, 0.09], labels=[0, 1])


def schedule(num_steps, sigma_min=0.002):
    return make_schedule("polynomial", num_steps=num_steps, sigma_min=sigma_min, sigma_max=80.0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_encoding_is_the_inverse_of_decoding_to_the_order_of_the_solver(mixture, solver, order):
    made, labels = make_solver(solver), torch.tensor([0, 1, 1])
    x0 = mixture.means[labels] + 0.1 * torch.randn(3, *SHAPE, dtype=torch.float64)
    errors = []
    for num_steps in (64, 128, 256):
        noise = encode(mixture, x0, sigmas=schedule(num_steps), solver=made, cond=labels)
        again = sample(mixture, noise, solver=made, sigmas=schedule(num_steps), cond=labels)
        errors.append(float((again - x0).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[0] / errors[2] > 4**order / 2
    assert errors[2] < (2e-2 if order == 1 else 2e-3)


def test_the_code_of_a_gaussian_is_its_standardised_image(mixture):
    """For one Gaussian the flow is linear: `x0 = m + sqrt(v) n` comes from noise `(m + sqrt(v + s^2) n) / s`."""
    labels, noise = torch.tensor([0, 1, 0]), torch.randn(3, *SHAPE, dtype=torch.float64)
    variance = mixture.variances[labels].view(3, 1, 1, 1)
    low, high = 0.002, 80.0
    x0 = mixture.means[labels] + (variance + low**2).sqrt() * noise
    expected = (mixture.means[labels] + (variance + high**2).sqrt() * noise) / high
    code = encode(mixture, x0, sigmas=schedule(256), solver=make_solver("heun"), cond=labels)
    torch.testing.assert_close(code, expected, rtol=1e-3, atol=1e-3)


def test_style_transfer_between_two_classes_is_the_affine_map(mixture):
    source, target = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])
    x0 = mixture.means[source] + 0.2 * torch.randn(3, *SHAPE, dtype=torch.float64)
    moved = style_transfer(
        mixture, mixture, x0, sigmas=schedule(256), solver=make_solver("heun"), source_cond=source, target_cond=target
    )
    expected = 0.5 + 0.3 / 0.2 * (x0 + 0.6)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("strength", [0.0, 0.24, 0.5, 1.0])
def test_strength_says_how_many_steps_are_left(mixture, strength):
    sigmas, x0, noise = schedule(4), torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    start = noised(x0, sigmas, strength, noise)
    if 0 < strength < 0.25:
        with pytest.warns(UserWarning, match="0.24 leaves none of 4 steps"):
            noised(x0, sigmas, strength, noise)
    left = {0.0: 0, 0.24: 0, 0.5: 2, 1.0: 4}[strength]
    assert len(start.sigmas) == left + 1 and torch.equal(start.sigmas, sigmas[4 - left :])
    made = image_to_image(mixture, x0, noise, strength=strength, solver=make_solver("heun"), sigmas=sigmas)
    if left == 0:
        assert torch.equal(made, x0)
    else:
        alone = image_to_image(
            mixture, x0[1:2], noise[1:2], strength=strength, solver=make_solver("heun"), sigmas=sigmas
        )
        torch.testing.assert_close(made[1:2], alone)
        assert (made - x0).abs().max() > 0.1


def test_image_to_image_at_full_strength_samples(mixture):
    """At 80 the image is lost in the noise, up to its size over 80."""
    sigmas, noise = schedule(32), torch.randn(3, *SHAPE, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    made = image_to_image(
        mixture, torch.zeros_like(noise), noise, strength=1.0, solver=make_solver("heun"), sigmas=sigmas, cond=labels
    )
    torch.testing.assert_close(made, sample(mixture, noise, solver=make_solver("heun"), sigmas=sigmas, cond=labels))


@pytest.mark.parametrize("solver", [make_solver("euler"), make_solver("unipc", order=2), StochasticEuler()])
@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
def test_inpainting_keeps_what_is_known_exactly_and_makes_the_rest(mixture, solver, sigma_min):
    sigmas = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.3, 0.1, sigma_min]).double()
    labels = torch.tensor([0, 1, 1])
    x0 = mixture.means[labels] + 0.1 * torch.randn(3, *SHAPE, dtype=torch.float64)
    mask = torch.zeros(3, 1, *SHAPE[1:])
    mask[..., :3] = 1
    noise = seeded_noise([1, 2, 3], SHAPE, dtype=torch.float64)
    made = inpaint(mixture, Known(x0, mask), noise, solver=solver, sigmas=sigmas, cond=labels, seeds=[1, 2, 3])
    assert torch.equal(made[..., :3], x0[..., :3])
    assert (made[..., 3:].mean((1, 2, 3)) - torch.tensor([-0.6, 0.5, 0.5])).abs().max() < 0.15
    garbage = torch.where(mask.bool(), x0, float("nan"))
    again = inpaint(
        mixture, Known(garbage, mask.bool()), noise, solver=solver, sigmas=sigmas, cond=labels, seeds=[1, 2, 3]
    )
    torch.testing.assert_close(again, made)


def test_the_known_region_decides_the_class_of_the_rest(mixture):
    """Without a condition, what is known must pull the rest to its component."""
    x0 = mixture.means[torch.tensor([0, 1])]
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[:, :, :4] = 1
    made = inpaint(mixture, Known(x0, mask), torch.randn_like(x0), solver=make_solver("euler"), sigmas=schedule(64))
    assert (made[:, :, 4:].mean((1, 2, 3)).sign() == torch.tensor([-1, 1])).all()


def test_repeated_steps_fit_what_is_made_to_what_is_known(mixture):
    """The known region tells the component of the rest; one step at each level mostly follows the noise instead."""
    components = torch.arange(40) % 2
    x0 = mixture.means[components]
    mask = torch.zeros(40, 1, *SHAPE[1:])
    mask[..., :2] = 1
    noise = seeded_noise(range(40), SHAPE, dtype=torch.float64)
    sigmas = torch.tensor([80, 20, 8, 5, 3.5, 2.5, 1.5, 0.3, 0]).double()
    options = {"solver": make_solver("euler"), "sigmas": sigmas}
    fits = []
    for repeats in (1, 16):
        made = inpaint(mixture, Known(x0, mask), noise, repeats=repeats, **options)
        assert torch.equal(made[..., :2], x0[..., :2])
        fits.append(float(((made[..., 2:].mean((1, 2, 3)) > 0) == components.bool()).double().mean()))
    assert fits[1] > fits[0] + 0.15 and fits[1] >= 0.95, fits
    alone = inpaint(mixture, Known(x0[3:4], mask[3:4]), noise[3:4], repeats=16, seeds=[3], **options)
    torch.testing.assert_close(alone, made[3:4])
    with pytest.raises(ValueError, match="repeats.*0"):
        inpaint(mixture, Known(x0, mask), noise, repeats=0, **options)


def test_the_noise_between_repeats_leads_back_to_the_level_of_the_step():
    """With data at one point every level's variance is sigma^2, however often a step is repeated."""
    point = GaussianMixture([1.0], torch.zeros(1, 4, 5), [0.0])
    start = Start(
        4 * torch.randn(2000, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0, 2.0, 1.0])
    )
    x = run(point, start, make_solver("euler"), repeats=3)
    assert x.var().item() == pytest.approx(1.0, rel=4 * (2 / x.numel()) ** 0.5)


def test_bad_input(mixture):
    x0, noise = torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE)
    options = {"solver": make_solver("euler"), "sigmas": schedule(4)}
    with pytest.raises(ValueError, match="strength"):
        image_to_image(mixture, x0, noise, strength=1.5, **options)
    with pytest.raises(ValueError, match="noise"):
        image_to_image(mixture, x0, noise[:2], strength=0.5, **options)
    with pytest.raises(ValueError, match="mask"):
        Known(x0, torch.ones(3, 1, 7, 5))
    with pytest.raises(ValueError, match="0, 1"):
        Known(x0, torch.full((3, 1, 5, 7), 2.0))
    with pytest.raises(ValueError, match="positive"):
        encode(mixture, x0, sigmas=torch.tensor([80.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="stochastic"):
        encode(mixture, x0, sigmas=schedule(4), solver=StochasticEuler())
    with pytest.raises(ValueError, match="set afs=False"):
        encode(mixture, x0, sigmas=schedule(4), solver=make_solver("ipndm", afs=True))
