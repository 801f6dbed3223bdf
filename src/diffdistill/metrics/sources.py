"""Images to evaluate: folders, zip archives, npz files, data sets, and samplers that draw them on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.data import Data, ImageData, ImageFolder, TensorData, ZipData, load_data, say_what_was_found
from diffdistill.data.base import from_uint8
from diffdistill.denoiser import image_shape, spread_labels
from diffdistill.files.archives import open_npz
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
        return read_npz(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {str(path)!r}")
    raise ValueError(f"cannot read images from {str(path)!r}: expected a folder, a .zip or an .npz")


def read_npz(path: Path) -> ImageData:
    """Images of an .npz file, see `open_images`; nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npz, or without images.
    """
    with open_npz(path, what="images") as file:
        key = next((name for name in ("x", "arr_0") if name in file.files), None)
        if key is None:
            raise ValueError(f"{str(path)!r} has no images x or arr_0: it holds {', '.join(file.files) or 'nothing'}")
        beside = {"x": "y", "arr_0": "arr_1"}[key]
        images, labels = file[key], file[beside] if beside in file.files else None
    if images.ndim != 4 or images.size == 0:
        raise ValueError(
            f"{key} in {str(path)!r} has shape {list(images.shape)}: expected at least one image, in four dimensions"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < -1):
        raise ValueError(
            f"{beside} in {str(path)!r} is {labels.dtype} {list(labels.shape)}: expected a label for each of the "
            f"{len(images)} images, an integer from 0, or -1 for none"
        )
    if key == "arr_0":
        if images.dtype != np.uint8:
            raise ValueError(f"arr_0 in {str(path)!r} holds {images.dtype}: expected bytes [N, H, W, C]")
        x = from_uint8(images.transpose(0, 3, 1, 2))
    else:
        if images.dtype.kind != "f" or not np.abs(images).max() <= WILD:
            span = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "fiu" else ""
            raise ValueError(f"x in {str(path)!r} holds {images.dtype}{span}: expected floats in [-1, 1]")
        x = torch.from_numpy(images.astype(np.float32)).clamp(-1, 1)
    y = torch.full((len(x),), -1) if labels is None else torch.from_numpy(labels.astype(np.int64))
    return TensorData(x, y, num_classes=int(y.max()) + 1)
