"""A procedural, class-conditional set of any resolution: one coloured shape on a shaded background.

Every image is drawn from its index alone, in closed form: the shape's signed distance at each pixel's centre,
in units of one pixel, gives the share of the pixel that it covers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import ImageData, checked_index

Array = np.ndarray
# Uniform numbers of one image: size, angle, centre (2), background (3), shading (2), then candidates for the colour,
# of which the one farthest from the background is taken.
_CANDIDATES = 4
_DRAWS = 9 + 3 * _CANDIDATES


def _disc(u: Array, v: Array, radius: float = 1.0) -> Array:
    return np.sqrt(u * u + v * v) - radius


def _box(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    # Exact inside and beside the edges; beyond a corner it is a lower bound, which moves no edge.
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _half_planes(u: Array, v: Array, sides: int, inner_radius: float) -> Array:
    angles = 2 * np.pi * np.arange(sides) / sides + np.pi / 2
    return np.multiply.outer(np.cos(angles), u) + np.multiply.outer(np.sin(angles), v) - inner_radius


def _star(u: Array, v: Array) -> Array:
    # A pentagram holds the points that lie outside at most one of its five lines.
    return np.partition(_half_planes(u, v, 5, np.cos(2 * np.pi / 5)), 3, axis=0)[3]


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _disc,
    "ring": lambda u, v: np.abs(_disc(u, v, 0.75)) - 0.25,
    "crescent": lambda u, v: np.maximum(_disc(u, v), -_disc(u - 0.5, v, 0.8)),
    "half_disc": lambda u, v: np.maximum(_disc(u, v + 0.4, 0.9), -0.4 - v),
    "triangle": lambda u, v: _half_planes(u, v, 3, 0.5).max(axis=0),
    "square": lambda u, v: _box(u, v, 0.7, 0.7),
    "frame": lambda u, v: np.maximum(_box(u, v, 0.7, 0.7), -_box(u, v, 0.4, 0.4)),
    "bar": lambda u, v: _box(u, v, 0.95, 0.3),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "star": _star,
}
"""Signed distance of each class in label order, negative inside; each shape lies in the unit disc of its frame."""


class Shapes(ImageData):
    """Ten classes of anti-aliased shapes with random colour, place, size, angle and background.

    Item i has the label `i % 10` and depends on `(seed, i, resolution)` alone. Equal seeds and indices show the
    same scene at every resolution.

    Args:
        size: number of images.
        resolution: height and width in pixels.
        seed: selects the set; a held-out set is one of another seed.

    Raises:
        ValueError: `size` or `resolution` below 1, or a negative `seed`.
    """

    def __init__(self, *, size: int = 50_000, resolution: int = 32, seed: int = 0) -> None:
        for name, value, least in (("size", size, 1), ("resolution", resolution, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"shapes: {name} is at least {least}, not {value}")
        self.size, self.seed = size, seed
        self.shape = (3, resolution, resolution)
        self.num_classes = len(SHAPES)
        centres = (np.arange(resolution) + 0.5) / resolution * 2 - 1
        self._v, self._u = centres[:, None].repeat(resolution, 1), centres[None].repeat(resolution, 0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = checked_index(index, self.size)
        label = index % self.num_classes
        draws = np.random.default_rng((self.seed, index)).random(_DRAWS)
        image = torch.from_numpy(self._draw(list(SHAPES.values())[label], draws).astype(np.float32))
        return {"x": image, "y": torch.tensor(label)}

    def _draw(self, distance: Callable[[Array, Array], Array], draws: Array) -> Array:
        radius = 0.35 + 0.35 * draws[0]
        angle = 2 * np.pi * draws[1]
        u = self._u - (1 - radius) * (2 * draws[2] - 1)
        v = self._v - (1 - radius) * (2 * draws[3] - 1)
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        pixels_per_unit = radius * self.shape[-1] / 2
        cover = np.clip(0.5 - distance(cos * u + sin * v, cos * v - sin * u) * pixels_per_unit, 0, 1)
        background = 2 * draws[4:7] - 1
        candidates = 2 * draws[9:].reshape(_CANDIDATES, 3) - 1
        colour = candidates[((candidates - background) ** 2).sum(axis=1).argmax()]
        shading = 0.3 * ((2 * draws[7] - 1) * self._u + (2 * draws[8] - 1) * self._v)
        shaded = np.clip(background[:, None, None] + shading, -1, 1)
        return shaded + cover * (colour[:, None, None] - shaded)
