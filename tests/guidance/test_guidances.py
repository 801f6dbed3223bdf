"""The guided teachers of stage 1: their formulas, their limits, and the share of inputs from their own runs."""

import pytest
import torch

from diffdistill.denoiser import per_sample
from diffdistill.guidance.inputs import on_trajectories
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.models import GuidanceConditioned, guidance_student, make_guidance
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_batch, tiny_denoiser

SIGMA = torch.tensor([0.1, 1.0, 9.0]).double()
W = torch.tensor([0.0, 1.5, 3.0])


@pytest.fixture
def teacher():
    return tiny_denoiser(0)


def answers(teacher, batch):
    with torch.no_grad():
        return teacher(batch["x"], SIGMA, batch["y"]), teacher(batch["x"], SIGMA, torch.full((3,), -1))


def guided(teacher, batch, name, **options):
    with torch.no_grad():
        return make_guidance(name, teacher, **options)(batch["x"], SIGMA, batch["y"], w=W)


def test_every_guidance_is_the_conditional_answer_at_w_0_and_costs_two(teacher):
    batch = tiny_batch(teacher)
    for name, options in (("cfg", {}), ("auto", {"weak": tiny_denoiser(1)}), ("apg", {}), ("rescale", {})):
        found = guided(teacher, batch, name, **options)
        torch.testing.assert_close(found[0], answers(teacher, batch)[0][0])
        assert make_guidance(name, teacher, **options).cost == 2
        assert (found[2] - answers(teacher, batch)[0][2]).abs().max() > 1e-4


def test_the_formulas(teacher):
    batch, weak = tiny_batch(teacher), tiny_denoiser(1)
    d, u = answers(teacher, batch)
    w = per_sample(W, d)
    torch.testing.assert_close(guided(teacher, batch, "cfg"), (1 + w) * d - w * u)
    with torch.no_grad():
        away = weak(batch["x"], SIGMA, batch["y"])
    torch.testing.assert_close(guided(teacher, batch, "auto", weak=weak), d + w * (d - away))
    plain = (1 + w) * d - w * u
    scale = per_sample(d.flatten(1).std(1) / plain.flatten(1).std(1), d)
    torch.testing.assert_close(guided(teacher, batch, "rescale", phi=0.4), 0.4 * plain * scale + 0.6 * plain)


def test_projected_guidance_moves_across_the_conditional_answer_and_eta_1_is_cfg(teacher):
    batch = tiny_batch(teacher)
    d, _ = answers(teacher, batch)
    moved = guided(teacher, batch, "apg") - d
    assert ((moved * d).flatten(1).sum(1) / d.flatten(1).norm(dim=1)).abs().max() < 1e-4
    torch.testing.assert_close(guided(teacher, batch, "apg", eta=1.0), guided(teacher, batch, "cfg"))
    short = guided(teacher, batch, "apg", eta=1.0, radius=0.01) - d
    torch.testing.assert_close(short.flatten(1).norm(dim=1), 0.01 * W, rtol=1e-3, atol=1e-5)


def test_outside_its_interval_nothing_is_guided(teacher):
    batch = tiny_batch(teacher)
    d, _ = answers(teacher, batch)
    found = guided(teacher, batch, "cfg", interval=(0.5, 2.0))
    torch.testing.assert_close(found[1], guided(teacher, batch, "cfg")[1])
    torch.testing.assert_close(found[[0, 2]], d[[0, 2]])
    bound = make_guidance("cfg", teacher, w=2.0, interval=(0.5, 2.0))
    with torch.no_grad():
        torch.testing.assert_close(bound(batch["x"], SIGMA, batch["y"])[2], d[2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cfgg", {}, "apg, auto, cfg, rescale"),
        ("cfg", {"interval": (2.0, 2.0)}, "0 <= low < high"),
        ("rescale", {"phi": 1.5}, "between 0 and 1"),
        ("apg", {"radius": 0.0}, "positive"),
        ("auto", {"weak": tiny_denoiser(data_shape=[3, 8, 8])}, "weak model"),
    ],
)
def test_bad_options(teacher, name, options, message):
    with pytest.raises(ValueError, match=message):
        make_guidance(name, teacher, **options)


def objective(teacher, **options):
    return GuidanceDistillation(
        teacher,
        guidance_student(tiny_denoiser(0), (0.0, 4.0)),
        noise_levels=make_noise_levels("cosine"),
        weighting=make_weighting("edm"),
        **options,
    )


def test_the_guidance_of_the_teacher_reaches_the_loss(teacher):
    batch = tiny_batch(teacher)
    losses = [
        objective(made).loss(batch, torch.Generator().manual_seed(3)).value.item()
        for made in (teacher, make_guidance("cfg", teacher), make_guidance("apg", teacher))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_inputs_from_trajectories_are_states_of_guided_runs(teacher):
    """Against a run of each sample alone with the same noise; the way to sigma_max and above has no steps."""
    batch, w = tiny_batch(teacher), torch.tensor([0.0, 1.0, 4.0])
    sigma = torch.tensor([0.2, 3.0, 80.0]).double()
    denoiser = GuidanceConditioned(make_guidance("cfg", teacher), w)
    x = on_trajectories(denoiser, batch["x"], sigma, batch["y"], torch.Generator().manual_seed(1), num_steps=5)
    alone = []
    for i in range(3):
        one = GuidanceConditioned(make_guidance("cfg", teacher), w[i : i + 1])
        noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))[i : i + 1] * 80
        angles = torch.linspace(0, 1, 6).double()
        first, last = torch.tensor(80 / 0.5).double().atan(), (sigma[i] / 0.5).atan()
        levels = 0.5 * (first + angles * (last - first)).tan()
        with torch.no_grad():
            for here, there in zip(levels[:-1], levels[1:], strict=True):
                denoised = one(noise, here[None], batch["y"][i : i + 1])
                noise = denoised + there.float() / here.float() * (noise - denoised)
        alone.append(noise)
    torch.testing.assert_close(x, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_a_share_of_batches_comes_from_trajectories(teacher):
    batch, seen = tiny_batch(teacher), []
    for share in (0.0, 0.5, 1.0):
        made = objective(teacher, trajectories=share, num_steps=1)
        plain = objective(teacher)
        pairs = [
            [o.loss(batch, torch.Generator().manual_seed(seed)).value.item() for o in (made, plain)]
            for seed in range(8)
        ]
        seen.append(sum(a != b for a, b in pairs))
    assert seen[0] == 0 and 0 < seen[1] < 8 and seen[2] == 8
    with pytest.raises(ValueError, match="share"):
        objective(teacher, trajectories=1.5)
