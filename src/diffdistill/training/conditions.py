"""The condition that a batch holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

PREFIX = "y."


def condition_of(batch: Mapping[str, Tensor], denoiser: nn.Module) -> Any:
    """The condition for `denoiser` in a batch: `y`, or a dict of all entries `y.NAME`, or None if it takes none.

    Raises:
        ValueError: the denoiser takes a condition, and the batch has none.
    """
    if not getattr(denoiser, "conditional", True):
        return None
    if "y" in batch:
        return batch["y"]
    parts = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
    if not parts:
        raise ValueError(f"the batch holds no condition y or y.NAME: it holds {', '.join(batch)}")
    return parts
