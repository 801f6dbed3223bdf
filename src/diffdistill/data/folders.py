"""Image folders, zip archives in the layout of EDM (Karras et al. 2022), and samples of a model."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.base import ImageData, MirroredData, TensorData, check_range, checked_index, from_uint8
from diffdistill.denoiser import NULL_LABEL

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder(ImageData):
    """Images of a folder; its sub-folders, where it has any, are the classes in alphabetical order.

    Args:
        root: the folder. A flat folder is a set without labels.
        resolution: the shorter side is resized to this and the centre cropped; None takes images as they are.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an image smaller than `resolution`, or of another size than the first where that is None.
    """

    def __init__(self, root: str | Path, *, resolution: int | None = None, channels: int = 3) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no image folder at {str(root)!r}")
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {channels}")
        if resolution is not None and resolution < 1:
            raise ValueError(f"resolution is at least 1 pixel, not {resolution}")
        self._resolution, self._channels = resolution, channels
        self._items: list[tuple[str, int]]
        if any(entry.is_dir() for entry in root.iterdir()):
            from torchvision.datasets import ImageFolder as ClassFolders

            found = ClassFolders(str(root), is_valid_file=_is_image, allow_empty=True)
            self._items, self.num_classes = found.samples, len(found.classes)
        else:
            self._items = [(str(path), NULL_LABEL) for path in sorted(root.iterdir()) if _is_image(str(path))]
        if not self._items:
            raise FileNotFoundError(f"no images in {str(root)!r}: expected files {', '.join(IMAGE_SUFFIXES)}")
        height, width = self._read(self._items[0][0]).shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, label = self._items[index]
        x = self._read(path)
        if tuple(x.shape) != self.shape:
            raise ValueError(f"{path!r} has shape {list(x.shape)}, the first image {list(self.shape)}: set resolution")
        return {"x": x, "y": torch.tensor(label)}

    def _read(self, path: str) -> Tensor:
        from PIL import Image

        with Image.open(path) as image:
            image = _converted(image, "RGB" if self._channels == 3 else "L")
        side = self._resolution
        if side is not None:
            short = min(image.size)
            if short < side:
                raise ValueError(f"{path!r} is {image.width}x{image.height}, smaller than resolution {side}")
            # Resizing and cropping in one step, with an antialiasing filter.
            left, top = (image.width - short) / 2, (image.height - short) / 2
            box = (left, top, left + short, top + short)
            image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
        return from_uint8(_channels_first(np.array(image)))


class ZipData(ImageData):
    """A zip of images with labels in `dataset.json`, as EDM's `dataset_tool.py` writes it.

    `dataset.json` reads `{"labels": [["00000/img00000000.png", 3], ...]}`; without it, or without `labels` in it, the
    set has no labels. An image is a PNG (or another format that Pillow reads), or an `.npy` `[C, H, W]` of bytes or of
    floats in [-1, 1]. Images are read when asked for; every process opens the archive for itself.

    Args:
        path: the archive.
        resolution: height and width that images must have; None takes those of the first.

    Raises:
        FileNotFoundError: no such file, or no images in it.
        ValueError: not a zip archive, a missing or non-integer label, or an image of another size or range.
    """

    def __init__(self, path: str | Path, *, resolution: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no zip data set at {str(path)!r}: make one with dataset_tool.py of EDM")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{str(path)!r} is not a zip archive")
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        names = self._open().namelist()
        self._names = sorted(name for name in names if _is_image(name) or name.lower().endswith(".npy"))
        if not self._names:
            raise FileNotFoundError(f"no images in {str(path)!r}: expected .npy or {', '.join(IMAGE_SUFFIXES)}")
        table = self._read_table() if "dataset.json" in names else None
        self._labels = torch.full((len(self._names),), NULL_LABEL) if table is None else self._labels_of(table)
        self.num_classes = int(self._labels.max()) + 1
        channels, height, width = self._read(self._names[0]).shape
        if resolution is not None and (height, width) != (resolution, resolution):
            raise ValueError(f"{str(path)!r} holds images of {width}x{height}, not {resolution}x{resolution}")
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = checked_index(index, len(self))
        x = self._read(self._names[index])
        if tuple(x.shape) != self.shape:
            raise ValueError(f"{self._names[index]!r} has shape {list(x.shape)}, the first image {list(self.shape)}")
        return {"x": x, "y": self._labels[index]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _open(self) -> zipfile.ZipFile:
        # A handle inherited through fork shares its file position with the parent, hence the owner.
        if self._archive is None or self._owner != os.getpid():
            self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def _read_table(self) -> dict[str, Any] | None:
        try:
            table = json.loads(self._open().read("dataset.json")).get("labels")
            return None if table is None else dict(table)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f'dataset.json of {str(self.path)!r} is not {{"labels": [[name, label], ...]}}') from None

    def _labels_of(self, labels: dict[str, Any]) -> Tensor:
        missing = next((name for name in self._names if name not in labels), None)
        if missing is not None:
            raise ValueError(f"dataset.json of {str(self.path)!r} has no label for {missing!r}")
        wrong = next((n for n in self._names if not isinstance(labels[n], int) or labels[n] < 0), None)
        if wrong is not None:
            raise ValueError(f"label {labels[wrong]!r} of {wrong!r} is not a non-negative integer")
        return torch.tensor([labels[name] for name in self._names])

    def _read(self, name: str) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            content = io.BytesIO(self._open().read(name))
            if not name.lower().endswith(".npy"):
                image = Image.open(content)
                grey = image.mode == "L" or image.mode.startswith("I")
                return from_uint8(_channels_first(np.array(_converted(image, "L" if grey else "RGB"))))
            values = np.load(content, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{name!r} of {str(self.path)!r} cannot be read ({reason})") from error
        if values.ndim != 3:
            raise ValueError(f"{name!r} has shape {list(values.shape)}: expected [C, H, W]")
        if values.dtype == np.uint8:
            return from_uint8(values)
        x = torch.from_numpy(values.astype(np.float32))
        check_range(x, repr(name))
        return x


def load_images(*, root: str | Path, resolution: int | None = None, channels: int = 3, flip: bool = False) -> ImageData:
    """Images of a folder (see `ImageFolder`); `flip` appends every image's mirror image."""
    data = ImageFolder(root, resolution=resolution, channels=channels)
    return MirroredData(data) if flip else data


def load_zip(*, path: str | Path, resolution: int | None = None, flip: bool = False) -> ImageData:
    """Images of a zip archive (see `ZipData`); `flip` appends every image's mirror image."""
    data = ZipData(path, resolution=resolution)
    return MirroredData(data) if flip else data


def load_samples(*, path: str | Path) -> ImageData:
    """What `diffdistill sample save=npz` wrote: a student can be trained on samples of its teacher, without its data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an `.npz` of images `x` in [-1, 1] and labels `y` (-1 for none).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no samples at {str(path)!r}: make them with diffdistill sample save=npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is not an .npz of samples x and labels y") from error
    return TensorData(x, y, num_classes=int(y.max()) + 1 if len(y) else 0)


def grey(folder: Path) -> bool:
    """Whether the first image of a folder is grey."""
    from PIL import Image

    first = next((p for p in sorted(folder.rglob("*")) if _is_image(p.name)), None)
    if first is None:
        return False
    with Image.open(first) as image:
        return image.mode in ("L", "1", "I;16")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _converted(image: Any, mode: str) -> Any:
    """An image of Pillow in the mode "RGB" or "L"; transparency is dropped."""
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        from PIL import Image

        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert(mode)


def _channels_first(image: np.ndarray) -> np.ndarray:
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
