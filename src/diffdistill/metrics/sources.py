"""Images to evaluate: folders, zip archives, npz files, data sets, and samplers that draw them on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data import Data, ImageData, ImageFolder, ZipData, load_data, say_what_was_found
from diffdistill.data.arrays import read_npz
from diffdistill.denoiser import image_shape, spread_labels
from diffdistill.metrics.collect import Keep, collect
from diffdistill.metrics.features import Features
from diffdistill.metrics.measures import needs_reference_features
from diffdistill.metrics.reference import Reference, load_reference, reference_of
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import Plan

WILD = 2.0
"""Samples that were not clipped leave [-1, 1] a little; values beyond this are of another range."""


class StoredImages:
    """The images of a data set, or of the first `limit` of them."""

    mixed = False

    def __init__(self, data: Data, *, limit: int | None = None) -> None:
        self.data, self.shape = data, data.shape
        if limit is not None and not 1 <= limit <= len(data):
            raise ValueError(f"num_samples={limit} is outside 1 to {len(data)}, the number of images there are")
        self._length = len(data) if limit is None else limit
        self.names = None if data.names is None else data.names[: self._length]

    def __len__(self) -> int:
        return self._length

    def batches(self, indices: range, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        labelled = self.data.num_classes > 0
        for start in range(indices.start, indices.stop, batch_size):
            items = self.data.stack(range(start, min(start + batch_size, indices.stop)))
            yield items["x"].to(device), items["y"] if labelled else None


class Sampler:
    """Images that a model draws, one seed for each.

    Args:
        plan: how to sample.
        num_samples: how many.
        seed: image i has the seed `seed + i`.
        labels: long `[num_samples]`; None spreads them evenly over the classes.
        on_images: called with the index of the first image of each batch, and the images.

    Attributes:
        seconds: time that this process spent drawing.
    """

    mixed = True
    names: Sequence[str] | None = None

    def __init__(
        self,
        plan: Plan,
        num_samples: int,
        *,
        seed: int = 0,
        labels: Tensor | None = None,
        on_images: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.plan, self.seed, self.on_images = plan, seed, on_images
        self.labels = spread_labels(num_samples, plan.denoiser.num_classes) if labels is None else labels
        self.shape = image_shape(plan.denoiser.data_shape, plan.denoiser.codec)
        self.seconds = 0.0
        self._length = num_samples

    def __len__(self) -> int:
        return self._length

    def batches(self, indices: range, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        labels = None if self.labels is None else self.labels[indices.start : indices.stop]
        seeds = range(self.seed + indices.start, self.seed + indices.stop)
        started, done = time.perf_counter(), 0
        for x in generate(self.plan, seeds, labels, batch_size=batch_size):
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            self.seconds += time.perf_counter() - started
            if self.on_images is not None:
                self.on_images(indices.start + done, x)
            yield x.to(device), None if labels is None else labels[done : done + len(x)]
            done += len(x)
            started = time.perf_counter()


def reference_from(
    given: Mapping[str, Any],
    features: Features,
    measures: Sequence[str],
    *,
    device: torch.device,
    batch_size: int = 256,
) -> Reference:
    """The reference of an extractor: read from `file`, a path, or computed from `data`, or its options for `load_data`.

    Raises:
        FileNotFoundError: the file or the data is not there.
        ValueError: it is not of these features.
    """
    if "file" in given:
        return load_reference(given["file"], extractor=features.name)
    keep, data = Keep(features=needs_reference_features(measures)), given["data"]
    images = StoredImages(load_data(**data) if isinstance(data, Mapping) else data)
    return reference_of(collect(images, features, keep=keep, batch_size=batch_size, device=device), features)


def open_images(
    source: str | os.PathLike[str] | dict[str, object],
    *,
    resolution: int | None = None,
    background: str | Sequence[int] = "white",
    skip_damaged: bool = False,
) -> ImageData:
    """Open stored images, and say in the log what was found.

    Args:
        source: a folder of images, a .zip of images, an .npz (`x` in [-1, 1], `[N, C, H, W]`, with labels `y`, as ours;
            or `arr_0`, bytes `[N, H, W, C]`, with labels `arr_1`, as ADM's), or options of `load_data`.
        resolution: of images in folders, as of `ImageFolder`, as are the others. They are grey only if all are.
        background: of images in folders and archives.
        skip_damaged: of images in folders and archives.

    Raises:
        FileNotFoundError: there is no such file or folder, or it is empty.
        ValueError: something else than images.
    """
    if isinstance(source, dict):
        return load_data(**source)  # type: ignore[arg-type]
    path, given = Path(source), {"resolution": resolution, "background": background, "skip_damaged": skip_damaged}
    if path.is_dir() or path.suffix == ".zip":
        data = ImageFolder(path, channels=None, **given) if path.is_dir() else ZipData(path, **given)
        say_what_was_found(data)
        return data
    if path.suffix == ".npz":
        return read_npz(path, largest=WILD)
    if not path.exists():
        raise FileNotFoundError(f"no images at {str(path)!r}")
    raise ValueError(f"cannot read images from {str(path)!r}: expected a folder, a .zip or an .npz")
