"""Images in an .npz file: samples of this package, and those of ADM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffdistill.data.base import ImageData, TensorData, from_uint8
from diffdistill.files.archives import open_npz


def load_samples(*, path: str | Path) -> ImageData:
    """What `diffdistill sample save=npz` wrote: a student can be trained on samples of its teacher, without its data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an `.npz` that `read_npz` reads.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no samples at {str(path)!r}: make them with diffdistill sample save=npz")
    return read_npz(Path(path))


def read_npz(path: Path, *, largest: float = 1.0) -> ImageData:
    """Images of an .npz file; nothing is unpickled.

    Either `x`, floats `[N, C, H, W]` in [-1, 1] with labels `y`, as ours; or `arr_0`, bytes `[N, H, W, C]`, with labels
    `arr_1`, as ADM's. Labels may be missing. Values of `x` beyond
    [-1, 1], but not beyond `largest`, are clipped.

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
        if images.dtype.kind != "f" or not np.abs(images).max() <= largest:
            span = f" from {images.min():g} to {images.max():g}" if images.dtype.kind in "fiu" else ""
            raise ValueError(f"x in {str(path)!r} holds {images.dtype}{span}: expected floats in [-1, 1]")
        x = torch.from_numpy(images.astype(np.float32)).clamp(-1, 1)
    y = torch.full((len(x),), -1) if labels is None else torch.from_numpy(labels.astype(np.int64))
    return TensorData(x, y, num_classes=int(y.max()) + 1)
