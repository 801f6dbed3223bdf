"""The scalars of a run between two lines of its log, kept on the device until they are needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import diffdistill.distributed as distributed


class NonFiniteLossError(RuntimeError):
    """A loss, gradient norm or weight that is not finite; `update` counts from 1."""

    def __init__(self, message: str, *, update: int) -> None:
        super().__init__(message)
        self.update = update


class Journal:
    """Collects scalars without waiting for the device, finds the first that is not finite, and averages them."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, str, list[Tensor]]] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, update: int, parts: Sequence[dict[str, Tensor]]) -> None:
        """Note the scalars of one optimiser step: their means over the parts that have them."""
        for name in {name: None for part in parts for name in part}:
            self._pending.append((update, name, [part[name] for part in parts if name in part]))

    def fetch(self) -> None:
        """Bring what is pending to the host.

        Raises:
            NonFiniteLossError: the loss or the norm of the gradient was not finite; it names the first such update.
        """
        if not self._pending:
            return
        flat = torch.stack([v.float() for _, _, values in self._pending for v in values])
        numbers = iter(distributed.mean(flat).tolist())
        pending, self._pending = self._pending, []
        for update, name, values in pending:
            value = math.fsum(next(numbers) for _ in values) / len(values)
            if name in ("loss", "grad_norm") and not math.isfinite(value):
                kind = "loss" if name == "loss" else "norm of the gradient"
                raise NonFiniteLossError(f"the {kind} is {value} at update {update}", update=update)
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        self.fetch()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint between two lines of the log needs; nothing may be pending."""
        return {name: list(total) for name, total in self._sums.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._pending, self._sums = [], {name: list(total) for name, total in state.items()}
