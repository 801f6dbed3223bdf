"""Latents and embeddings that were computed once: shards of safetensors with an index."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.data.base import ImageData, checked_index
from diffdistill.denoiser import Codec
from diffdistill.files.atomic import write_text
from diffdistill.files.contents import CONTENTS
from diffdistill.files.records import save_tensors
from diffdistill.registry import choose

INDEX = "index.json"
AUTOENCODER = "autoencoder.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Item = TypeVar("Item")


class LatentData(ImageData):
    """Latents with their conditions: item i is `{"x": [C, h, w], ...}` in float32, with a label `y` or parts `y.NAME`.

    Args:
        path: a folder that `write_shards` and `write_index` filled, such as `diffdistill cache-latents` does.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: a shard that is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise FileNotFoundError(f"no cached latents at {str(path)!r}: make them with diffdistill cache-latents")
        index = json.loads((self.path / INDEX).read_text())
        self.shape = tuple(index["shape"])
        self.num_classes = index.get("num_classes", 0)
        name = index.get("autoencoder")
        self.autoencoder = None if name is None else self.path / name
        self._shards: list[str] = [name for name, _ in index["shards"]]
        self._ends = list(accumulate(count for _, count in index["shards"]))
        for name in self._shards:
            if not (self.path / name).is_file():
                raise ValueError(f"the shard {name} of {str(path)!r} is missing: make the latents again")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = checked_index(index, len(self))
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        try:
            with safe_open(self.path / self._shards[shard], framework="pt") as file:
                return {name: _wide(file.get_slice(name)[row]) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the shard {self.path / self._shards[shard]} is damaged: {error}") from None

    def tensors(self) -> dict[str, Tensor]:
        shards = [load_file(self.path / name) for name in self._shards]
        return {name: _wide(torch.cat([shard[name] for shard in shards])) for name in shards[0]}


def _wide(tensor: Tensor) -> Tensor:
    """Numbers in float32, labels as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def write_shard(
    folder: Path, number: int, items: Mapping[str, Tensor], origin: Mapping[str, Any], digest: str = ""
) -> tuple[str, int]:
    """Write items `{"x": [n, ...], ...}` as one shard, and what they were made from; returns its name and n."""
    name = f"{number:06d}.safetensors"
    state = {key: value.contiguous() for key, value in items.items()}
    save_tensors(state, folder / name, {"origin": json.dumps(origin), "items": digest})
    return name, len(items["x"])


def write_shards(
    folder: Path,
    items: Iterable[Item],
    encode: Callable[[list[Item]], Mapping[str, Tensor]],
    *,
    shard_size: int,
    origin: Mapping[str, Any],
    digest: Callable[[list[Item]], str] = lambda items: "",
) -> list[tuple[str, int]]:
    """Encode items and write them, `shard_size` in a file; returns names and sizes, for `write_index`.

    A shard that is there already and whole is kept, so that a run can go on; one whose items have changed since, by
    their `digest`, is made again.

    Raises:
        ValueError: the folder holds shards of another origin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[str, int]] = []
    stream = iter(items)
    while batch := list(islice(stream, shard_size)):
        path = folder / f"{len(shards):06d}.safetensors"
        made_from = digest(batch)
        if _holds(path, len(batch), origin, made_from):
            shards.append((path.name, len(batch)))
        else:
            shards.append(write_shard(folder, len(shards), encode(batch), origin, made_from))
    return shards


def _holds(shard: Path, count: int, origin: Mapping[str, Any], items: str) -> bool:
    """Whether a file is a shard of so many items, and of these; raises `ValueError` if it is of another origin."""
    try:
        with safe_open(shard, framework="pt") as file:
            metadata, length = file.metadata() or {}, file.get_slice("x").get_shape()[0]
        made_from = json.loads(metadata["origin"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return False  # missing or damaged
    if made_from != origin:
        then, now = (
            {**o, **{f"what {n} holds": d for n, d in o.get(CONTENTS, {}).items()}} for o in (made_from, origin)
        )
        changed = [name for name in {**then, **now} if name != CONTENTS and then.get(name) != now.get(name)]
        raise ValueError(
            f"{shard.parent} holds latents of another source or with other settings ({', '.join(changed)}): choose a "
            "new folder"
        )
    return length == count and metadata.get("items", "") == items


def write_index(
    folder: Path,
    shards: list[tuple[str, int]],
    shape: tuple[int, ...],
    origin: Mapping[str, Any],
    *,
    num_classes: int = 0,
    autoencoder: str | None = None,
) -> None:
    """Write what makes the shards a data set, last; `autoencoder` is a file in the folder."""
    index = {"shape": list(shape), "num_classes": num_classes, "autoencoder": autoencoder, "shards": shards}
    write_text(folder / INDEX, json.dumps({**index, "origin": dict(origin)}, indent=1))


def cache_images(
    codec: Codec,
    data: ImageData,
    out: str | Path,
    *,
    save_codec: Callable[[Path], None] | None = None,
    origin: Mapping[str, Any],
    batch_size: int = 256,
    shard_size: int = 8192,
    dtype: str = "float16",
    device: torch.device | str = "cpu",
) -> Path:
    """Encode a set of images with labels for training; a shard that is there already is kept.

    Args:
        codec: the autoencoder.
        data: the images.
        out: the folder to write to; `LatentData` reads it.
        save_codec: writes the autoencoder to a path; its file lies beside the shards. None where it has no such file.
        origin: what the latents are made from and how.
        batch_size: images encoded at once.
        shard_size: items of a file.
        dtype: of what is stored: float32, float16 or bfloat16.
        device: where the codec is.

    Raises:
        ValueError: a folder that was made from another origin, or an unknown dtype.
    """
    kind, out = choose("dtype", dtype, DTYPES), Path(out)

    def encoded(indices: list[int]) -> dict[str, Tensor]:
        items = [data[i] for i in indices]
        images = torch.stack([item["x"] for item in items]).split(batch_size)
        x = torch.cat([codec.encode(part.to(device)).cpu() for part in images])
        return {"x": x.to(kind), "y": torch.stack([item["y"] for item in items])}

    shards = write_shards(out, range(len(data)), encoded, shard_size=shard_size, origin=origin)
    if save_codec is not None:
        save_codec(out / AUTOENCODER)
    channels, height, width = data.shape
    example = codec.encode(torch.zeros(1, channels, height, width, device=device))
    saved = None if save_codec is None else AUTOENCODER
    write_index(out, shards, example.shape[1:], origin, num_classes=data.num_classes, autoencoder=saved)
    return out
