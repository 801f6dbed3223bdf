"""Data in the forms in which people have them: tensors, pairs, data sets of other libraries, folders and files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffdistill.data.archives import ZipData
from diffdistill.data.arrays import load_samples
from diffdistill.data.base import ImageData
from diffdistill.data.folders import ImageFolder
from diffdistill.data.latents import INDEX, LatentData
from diffdistill.denoiser import NULL_LABEL, Denoiser

FORMS = "a tensor [N, ...], a pair of samples and labels, a dict of tensors, a map-style data set, a folder or a file"


class Data(Protocol):
    """What training and measures take: a map-style data set of dicts of tensors that knows its shape.

    Attributes:
        shape: of one sample.
        num_classes: number of class labels, 0 for none.
        autoencoder: for latents, the file of what turns them into images, if it is known.
        found: what was found where the set was looked for, in one line, or None.
        names: of the samples, where they have any.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def autoencoder(self) -> Path | None: ...
    @property
    def found(self) -> str | None: ...
    @property
    def names(self) -> Sequence[str] | None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...
    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]: ...
    def tensors(self) -> dict[str, Tensor]: ...


class _Given:
    """What is not known of data that are given as they are."""

    autoencoder = found = names = None

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} defines no __len__")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} defines no __getitem__")

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Some of the set, `{name: [n, ...]}`."""
        items = [self[i] for i in indices]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def tensors(self) -> dict[str, Tensor]:
        """The whole set in memory."""
        return self.stack(range(len(self)))


def say_what_was_found(data: Data) -> None:
    """Write in the log, in one line, what a set was made of and what was skipped."""
    if data.found is not None:
        logging.getLogger("diffdistill").info("%s", data.found)


class GivenTensors(_Given):
    """Tensors that hold all samples: `x` `[N, ...]`, and conditions `y` `[N]` or `y.NAME` `[N, ...]`.

    Raises:
        ValueError: no `x`, no floats, or tensors of different lengths.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if "x" not in tensors:
            raise ValueError(f"data without samples x: it holds {', '.join(tensors) or 'nothing'}")
        self._tensors = {name: torch.as_tensor(value).detach() for name, value in tensors.items()}
        x = self._tensors["x"] = _floats(self._tensors["x"])
        lengths = {name: len(value) if value.ndim else 0 for name, value in self._tensors.items()}
        if x.ndim < 2 or set(lengths.values()) != {len(x)} or len(x) == 0:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self._tensors.items())
            raise ValueError(f"data are samples x [N, ...] with as many conditions, not {shapes}")
        self.shape, self.num_classes = tuple(x.shape[1:]), 0
        if not _has_parts(tensors):
            y = self._tensors["y"] = _labels(self._tensors.get("y", torch.full((len(x),), NULL_LABEL)))
            self.num_classes = int(y.max()) + 1

    def __len__(self) -> int:
        return len(self._tensors["x"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self._tensors.items()}

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors


class GivenItems(_Given):
    """A map-style data set of tensors, of pairs of a tensor and a label, or of dicts with `x`.

    Args:
        items: the data set; it is asked for an item when that is needed.
        num_classes: number of class labels; by default `items.num_classes`, the length of `items.classes`, or unknown:
            then 0 without labels, and else one more than the largest of `items.targets`.

    Raises:
        ValueError: items of another kind.
    """

    def __init__(self, items: Any, num_classes: int | None = None) -> None:
        self._items = items
        if len(items) == 0:
            raise ValueError("the data set is empty")
        first = self[0]
        self.shape = tuple(first["x"].shape)
        self.num_classes = self._count_classes() if num_classes is None else num_classes
        if num_classes is None and not self.num_classes and int(first.get("y", NULL_LABEL)) != NULL_LABEL:
            raise ValueError("the data set has labels, but does not say of how many classes: give it num_classes")

    def _count_classes(self) -> int:
        known = getattr(self._items, "num_classes", None)
        if known is None and hasattr(self._items, "classes"):
            known = len(self._items.classes)
        if known is None and hasattr(self._items, "targets"):
            known = int(torch.as_tensor(self._items.targets).max()) + 1
        return int(known or 0)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self._items[index]
        if isinstance(item, Tensor):
            item = {"x": item}
        elif isinstance(item, (tuple, list)) and len(item) == 1:
            item = {"x": item[0]}
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            item = {"x": item[0], "y": item[1]}
        if not isinstance(item, Mapping) or not isinstance(item.get("x"), Tensor):
            found = type(item.get("x") if isinstance(item, Mapping) else item).__name__
            hint = ": turn pictures into tensors by a transform" if "Image" in found else ""
            raise ValueError(f"items of data are tensors, pairs (tensor, label) or dicts with x, not {found}{hint}")
        labels = {} if _has_parts(item) else {"y": _labels(torch.as_tensor(item.get("y", NULL_LABEL)))}
        return {**item, "x": _floats(item["x"]), **labels}


def check_data(data: Data, denoiser: Denoiser) -> None:
    """Refuse samples that are not those of a denoiser.

    Raises:
        ValueError: samples of another shape, or of fewer classes.
    """
    if tuple(data.shape) != tuple(denoiser.data_shape) or data.num_classes < denoiser.num_classes:
        raise ValueError(
            f"the data has samples {list(data.shape)} of {data.num_classes} classes, "
            f"but the model takes {list(denoiser.data_shape)} of {denoiser.num_classes}"
        )


def as_data(given: Any, *, shape: Sequence[int] | None = None) -> Data:
    """Data in any of its forms as a data set of dicts of tensors.

    Args:
        given: `[N, ...]` samples; a pair of these and labels, long `[N]`; a dict of `x`, and `y` or parts `y.NAME` of a
            condition; a map-style data set whose items are samples, pairs or such dicts; the path of a folder of
            images or of cached latents, of a .zip of images, or of an .npz of samples. Images lie in [-1, 1].
        shape: of the samples that are wanted, `(C, H, W)`, which the images of a folder are brought to.

    Raises:
        ValueError: none of these, or samples that are no floats.
        FileNotFoundError: there is no such folder or file.
        TypeError: something that cannot be indexed.
    """
    if isinstance(given, (ImageData, GivenTensors, GivenItems)):
        return given
    if isinstance(given, (str, os.PathLike)):
        opened = open_data(Path(given), shape=shape)
        say_what_was_found(opened)
        return opened
    if isinstance(given, Tensor):
        return GivenTensors({"x": given})
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        return GivenTensors({"x": given[0], "y": given[1]})
    if isinstance(given, Mapping):
        return GivenTensors(given)
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return GivenItems(given)
    raise TypeError(f"data are {FORMS}, not {type(given).__name__}")


def open_data(path: Path, *, shape: Sequence[int] | None = None) -> Data:
    """The data of a folder or file, see `as_data`."""
    if (path / INDEX).is_file():
        return LatentData(path)
    if path.is_dir():
        wanted = shape is not None and len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]
        if shape is not None and wanted:
            return ImageFolder(path, channels=shape[0], resolution=shape[1])
        return ImageFolder(path, channels=None)
    if path.suffix == ".zip":
        return ZipData(path)
    if path.suffix == ".npz":
        return load_samples(path=path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {str(path)!r}")
    raise ValueError(f"cannot read data from {str(path)!r}: expected a folder, a .zip or an .npz")


def _has_parts(item: Mapping[str, Any]) -> bool:
    """Whether the condition is of several parts, `y.NAME`."""
    return any(name.startswith("y.") for name in item)


def _floats(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        hint = ", such as x / 127.5 - 1 of bytes" if x.dtype == torch.uint8 else ""
        raise ValueError(f"samples are floats{hint}, not {x.dtype}")
    return x.float()


def _labels(y: Tensor | Sequence[int]) -> Tensor:
    y = torch.as_tensor(y)
    if y.is_floating_point() or y.dtype == torch.bool or y.ndim > 1 or bool((y < NULL_LABEL).any()):
        raise ValueError(f"labels are integers from 0, or -1 for none, not {y.dtype} {list(y.shape)}")
    return y.long()
