import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffdistill.data import SHAPES, load_data


def test_an_image_depends_on_seed_and_index_alone():
    data = load_data("shapes", size=23, resolution=12, seed=5)
    forward = [data[i]["x"] for i in range(23)]
    backward = [load_data("shapes", size=99, resolution=12, seed=5)[i]["x"] for i in reversed(range(23))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    other = load_data("shapes", size=23, resolution=12, seed=6)
    assert not any(torch.equal(other[i]["x"], forward[i]) for i in range(23))


def test_workers_give_the_same_items():
    data = load_data("shapes", size=14, resolution=9)
    batches = list(DataLoader(data, batch_size=5, num_workers=2))
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), data.tensors()["x"])
    assert torch.equal(torch.cat([batch["y"] for batch in batches]), torch.arange(14) % 10)


def test_images_are_in_range_and_all_differ():
    x, y = load_data("shapes", size=60, resolution=17).tensors().values()
    assert x.shape == (60, 3, 17, 17) and x.dtype == torch.float32
    assert float(x.abs().max()) <= 1
    assert len(x.flatten(1).unique(dim=0)) == 60
    assert y.bincount().tolist() == [6] * len(SHAPES)


def test_edges_are_anti_aliased():
    # A resolution of n shows the scene of 8 n averaged over 8x8 blocks, up to the curvature within a pixel.
    coarse = load_data("shapes", size=20, resolution=16).tensors()["x"]
    fine = load_data("shapes", size=20, resolution=128).tensors()["x"]
    error = (torch.nn.functional.avg_pool2d(fine, 8) - coarse).abs()
    assert float(error.mean()) < 0.01
    nearest = (fine[..., 4::8, 4::8] - coarse).abs()
    assert float(error.mean()) < 0.4 * float(nearest.mean())


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_lies_in_the_unit_disc_and_covers_what_it_should(name):
    side = np.linspace(-1.5, 1.5, 997) + 1e-4
    u, v = np.meshgrid(side, side)
    inside = SHAPES[name](u, v) < 0
    assert not inside[np.hypot(u, v) > 1.001].any()
    cell = (side[1] - side[0]) ** 2
    distance, radius = 0.5, 0.8
    lens_1 = np.arccos((distance**2 + 1 - radius**2) / (2 * distance))
    lens_2 = radius**2 * np.arccos((distance**2 + radius**2 - 1) / (2 * distance * radius))
    triangle = ((1 + radius) ** 2 - distance**2) * (distance**2 - (1 - radius) ** 2)
    expected = {
        "circle": np.pi,
        "ring": np.pi * 0.75,
        "crescent": np.pi - lens_1 - lens_2 + np.sqrt(triangle) / 2,
        "half_disc": np.pi * 0.81 / 2,
        "triangle": 3 * np.sqrt(3) / 4,
        "square": 1.96,
        "frame": 1.96 - 0.64,
        "bar": 4 * 0.95 * 0.3,
        "cross": 2 * 4 * 0.95 * 0.3 - 0.36,
        # Ten triangles from the centre to a tip and a notch of the pentagram.
        "star": 10 * 0.5 * np.cos(2 * np.pi / 5) / np.cos(np.pi / 5) * np.sin(np.pi / 5),
    }
    assert inside.sum() * cell == pytest.approx(expected[name], rel=0.006)


@pytest.mark.parametrize(("option", "value"), [("size", 0), ("resolution", 0), ("seed", -1)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option} is at least [01], not {value}"):
        load_data("shapes", **{option: value})
