"""The measures of a set of samples, in one call."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from diffdistill.data.base import ImageData
from diffdistill.evaluation.classifier import load_classifier
from diffdistill.evaluation.features import gaussian_of, make_features
from diffdistill.evaluation.frechet import frechet_distance
from diffdistill.evaluation.memorisation import Memorisation, measure_memorisation

DIGITS_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Measures:
    """What `evaluate_samples` measured.

    Attributes:
        num_samples: number of samples.
        frechet_pixels: Fréchet distance of the pixel values.
        frechet_features: Fréchet distance on features of the digit classifier; None for other images than digits.
        accuracy: share of samples that the digit classifier gives the label they were asked for; None likewise.
        memorisation: nearest training images, samples against unseen real images.
    """

    num_samples: int
    frechet_pixels: float
    frechet_features: float | None
    accuracy: float | None
    memorisation: Memorisation

    def numbers(self) -> dict[str, float]:
        """All that was measured, flat, by name."""
        values = asdict(self)
        values.update(values.pop("memorisation"))
        return {name: value for name, value in values.items() if value is not None}


def evaluate_samples(x: Tensor, y: Tensor | None, data: ImageData, *, unseen: ImageData | None = None) -> Measures:
    """Measure samples against a data set that fits in memory. Samples are clipped to [-1, 1] first.

    Args:
        x: samples `[N, C, H, W]`.
        y: the labels that they were asked for, long `[N]`, or None.
        data: the reference, which is also the training set whose nearest images are sought.
        unseen: real images that the model was not trained on; None compares training images with each other.

    Raises:
        ValueError: samples of another shape than the data's, or not finite.
    """
    if tuple(x.shape[1:]) != data.shape:
        raise ValueError(f"samples have shape {list(x.shape[1:])}, the data {list(data.shape)}")
    x = x.detach().float().clamp(-1, 1)
    reference = data.tensors()["x"].to(x.device)

    def frechet(name: str) -> float:
        features = make_features(name)
        return frechet_distance(gaussian_of(features, x), gaussian_of(features, reference))

    digits = data.shape == DIGITS_SHAPE and data.num_classes == 10
    return Measures(
        num_samples=len(x),
        frechet_pixels=frechet("pixels"),
        frechet_features=frechet("digits_classifier") if digits else None,
        accuracy=load_classifier().to(x.device).accuracy(x, y) if digits and y is not None else None,
        memorisation=measure_memorisation(x, reference, None if unseen is None else unseen.tensors()["x"].to(x.device)),
    )
