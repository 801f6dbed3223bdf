"""Latents and embeddings that were computed once: shards of safetensors with an index."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.atomic import replacing, write_text
from diffdistill.data.base import ImageData, checked_index

INDEX = "index.json"


class LatentData(ImageData):
    """Latents with their conditions: item i is `{"x": [C, h, w], "y.NAME": [...]}`, in float32.

    Args:
        path: a folder that `write_shard` and `write_index` filled, such as `scripts/cache_latents.py` does.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: a shard that is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise FileNotFoundError(f"no cached latents at {str(path)!r}: make them with scripts/cache_latents.py")
        index = json.loads((self.path / INDEX).read_text())
        self.shape = tuple(index["shape"])
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
                return {name: file.get_slice(name)[row].float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the shard {self.path / self._shards[shard]} is damaged: {error}") from None

    def tensors(self) -> dict[str, Tensor]:
        shards = [load_file(self.path / name) for name in self._shards]
        return {name: torch.cat([shard[name] for shard in shards]).float() for name in shards[0]}


def write_shard(folder: Path, number: int, items: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write items `{"x": [n, ...], ...}` as one shard; returns its name and n."""
    name = f"{number:06d}.safetensors"
    with replacing(folder / name) as temporary:
        save_file({key: value.contiguous() for key, value in items.items()}, temporary)
    return name, len(items["x"])


def write_index(folder: Path, shards: list[tuple[str, int]], shape: tuple[int, ...], origin: Mapping[str, Any]) -> None:
    """Write what makes the shards a data set, last."""
    index = {"shape": list(shape), "shards": shards, "origin": dict(origin)}
    write_text(folder / INDEX, json.dumps(index, indent=1))
