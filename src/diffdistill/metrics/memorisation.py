"""How much a model memorises: distances from samples to the nearest training image, beside those of unseen images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.metrics.manifold import nearest, radii


@dataclass(frozen=True)
class Memorisation:
    """Euclidean distances to the nearest training image, samples against unseen real images.

    Attributes:
        samples_median, unseen_median: medians of the two.
        ratio: the first divided by the second: about 1 for a model that generalises, 0 for one that copies.
        closer_share: share of samples nearer to a training image than 95 % of the unseen images are (0.05 expected).
    """

    samples_median: float
    unseen_median: float
    ratio: float
    closer_share: float


def nearest_distances(images: Tensor, training: Tensor) -> Tensor:
    """Distance of each image `[M, ...]` to the nearest of `training` `[N, ...]`: float64 `[M]`."""
    return nearest(images.flatten(1), training.flatten(1))[1]


def measure_memorisation(samples: Tensor, training: Tensor, unseen: Tensor | None = None) -> Memorisation:
    """Compare the samples' nearest distances with those of unseen images.

    Args:
        samples: `[M, C, H, W]`.
        training: the images the model was trained on, `[N, C, H, W]`.
        unseen: real images it was not trained on, `[K, C, H, W]`. None stands for each training image against the
            others, which is what an unseen image meets in a set of N - 1.
    """
    of_samples = nearest_distances(samples, training)
    of_unseen = radii(training.flatten(1).double(), 1) if unseen is None else nearest_distances(unseen, training)
    medians = float(of_samples.median()), float(of_unseen.median())
    threshold = torch.quantile(of_unseen, 0.05)
    closer = float((of_samples < threshold.to(of_samples.device)).double().mean())
    return Memorisation(*medians, ratio=medians[0] / medians[1] if medians[1] else float("nan"), closer_share=closer)
