"""The shape of trajectories, on curves whose shape is known."""

import math

import pytest
import torch

from diffdistill.models import GaussianMixture
from diffdistill.solver_comparison.trajectories import analyze, chord_deviation, circle_curvature, plot_shapes
from diffdistill.solvers import Trajectory, make_schedule, make_solver, sample

POINTS = 9


def embedded(curve):
    """A curve `[P, d]` as two trajectories in [2, 5, 7], turned and shifted differently."""
    trajectories = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        frame = torch.linalg.qr(torch.randn(70, curve.shape[1], generator=generator, dtype=torch.float64))[0]
        trajectories.append(curve @ frame.T + torch.randn(70, generator=generator, dtype=torch.float64))
    x = torch.stack(trajectories, dim=1).view(len(curve), 2, 2, 5, 7)
    return Trajectory(x, torch.linspace(2, 1, len(curve)), 0)


def arc(radius, pitch=0.0):
    angle = torch.linspace(0, math.pi, POINTS, dtype=torch.float64)
    return torch.stack([radius * angle.cos(), radius * angle.sin(), pitch * angle], dim=1)


def test_a_half_circle():
    shape = analyze(embedded(arc(3.0)), components=3)
    torch.testing.assert_close(shape.curvature, torch.full((POINTS - 2, 2), 1 / 3).double(), rtol=1e-7, atol=0)
    assert shape.deviation.amax(0).tolist() == pytest.approx([3.0, 3.0])
    assert shape.length.tolist() == pytest.approx([6.0, 6.0])
    torch.testing.assert_close(shape.explained[:, 1], torch.ones(2).double())
    assert (shape.explained[:, 0] < 0.95).all()
    assert shape.reconstruction[1:].max() < 1e-6 < shape.reconstruction[0].min(1)[0].max()


def test_summaries_name_the_level_where_a_trajectory_bends():
    """A half circle with an uneven spacing of points, whose curvature does not depend on it, and a sharp corner."""
    angle = math.pi * torch.linspace(0, 1, POINTS, dtype=torch.float64) ** 2
    circle = torch.stack([3 * angle.cos(), 3 * angle.sin(), 0 * angle], dim=1)
    torch.testing.assert_close(
        analyze(embedded(circle), components=2).curvature, torch.full((POINTS - 2, 2), 1 / 3).double()
    )
    corner = torch.tensor([[0, 0], [1, 1], [2, 0], [3, 0], [5, 0]], dtype=torch.float64)
    shape = analyze(embedded(corner), components=1)
    numbers = shape.numbers()
    assert numbers["deviation_largest_at_sigma"] == numbers["curvature_largest_at_sigma"] == 1.75
    largest = (shape.reconstruction[0].amax(0) / 5).mean().item()
    assert numbers["reconstruction_largest_of_chord"] == [pytest.approx(largest)]
    assert numbers["chord_mean"] == pytest.approx(5.0)


def test_a_helix_leaves_the_plane():
    """Reconstruction errors and explained variance say the same: mean squares left out over the total."""
    run = embedded(arc(3.0, pitch=0.7))
    shape = analyze(run, components=3)
    total = (run.x - run.x.mean(0)).flatten(2).square().sum((0, 2))
    for k in range(3):
        left = shape.reconstruction[k].square().sum(0) / total
        torch.testing.assert_close(1 - shape.explained[:, k], left, atol=1e-9, rtol=1e-6)
    assert (shape.explained[:, 1] < 1 - 1e-4).all()
    torch.testing.assert_close(shape.explained[:, 2], torch.ones(2).double())


def test_a_line():
    points = torch.linspace(0, 1, POINTS, dtype=torch.float64)[None, :, None] * torch.ones(1, 1, 5).double()
    assert chord_deviation(points).max() < 1e-12
    assert circle_curvature(points).max() < 1e-7


def test_trajectories_of_a_mixture_are_nearly_plane():
    """The observation that AMED rests on: two components explain almost everything, one does not."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 2, 5, 7, generator=generator, dtype=torch.float64)
    mixture = GaussianMixture([0.25] * 4, means, [0.05] * 4)
    noise = torch.randn(20, 2, 5, 7, generator=generator, dtype=torch.float64)
    sigmas = make_schedule("polynomial", num_steps=40, sigma_min=0.002, sigma_max=80.0)
    shape = analyze(sample(mixture, noise, solver=make_solver("heun"), sigmas=sigmas, return_trajectory=True))
    numbers = shape.numbers()
    assert (numbers["trajectories"], numbers["points"]) == (20, 41)
    assert numbers["explained_mean"][1] > 0.999
    assert 0.002 < numbers["deviation_largest_of_chord"] < 0.2


def test_figure(tmp_path):
    plot_shapes([("arc", analyze(embedded(arc(3.0, 0.5)), components=3))], tmp_path / "shape.png")
    assert (tmp_path / "shape.png").stat().st_size > 5000


def test_bad_input():
    run = embedded(arc(3.0))
    with pytest.raises(ValueError, match="at least 3 points"):
        analyze(Trajectory(run.x[:2], run.sigmas[:2], 0))
    for components in (0, 10):
        with pytest.raises(ValueError, match="1 to 9"):
            analyze(run, components=components)
