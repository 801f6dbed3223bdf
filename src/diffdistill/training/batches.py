"""Which samples make up which update: a pure function of the seed and the update, so that there is no state to save."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffdistill.training.randomness import seed_from

MEMORY_LIMIT = 2 * 2**30
"""Data sets up to this many bytes are held on the training device."""


class DataError(RuntimeError):
    """The data could not be read in the middle of a run; the message is one line."""


class MapData(Protocol):
    """A map-style data set of dicts of tensors. It may have `tensors()`, all items stacked, to be held in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


class SampleOrder:
    """Every epoch is a permutation of the data; updates take `batch_size` after `batch_size` from their sequence.

    Args:
        length: number of samples of the data set.
        batch_size: samples of an update, over all processes.
        seed: of the permutations.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if length < 1:
            raise ValueError("the data set is empty")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def indices(self, update: int) -> Tensor:
        """Indices of the samples of an update, long `[batch_size]`."""
        start, end = update * self.batch_size, (update + 1) * self.batch_size
        parts = []
        while start < end:
            epoch, first = divmod(start, self.length)
            count = min(end - start, self.length - first)
            parts.append(self.permutation(epoch)[first : first + count])
            start += count
        return torch.cat(parts)

    def permutation(self, epoch: int) -> Tensor:
        """The order of the samples in an epoch, long `[length]`."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_from(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        return self._permutation


class _UpdateSampler:
    """The batch sampler of a loader that starts at an update."""

    def __init__(self, order: SampleOrder, rows: slice, updates: range) -> None:
        self.order, self.rows, self.updates = order, rows, updates

    def __iter__(self) -> Iterator[list[int]]:
        for update in self.updates:
            yield self.order.indices(update)[self.rows].tolist()

    def __len__(self) -> int:
        return len(self.updates)


class Batches:
    """The batches of a range of updates, on the device.

    Args:
        data: the data set; None is for objectives that need none: their batches hold `index`, long `[B]`, the number
            of the sample in the run.
        batch_size: samples of an update, over all processes.
        seed: of the order of the samples.
        rows: the rows of the batch that belong to this process.
        device: where batches go.
        workers: processes that load data where it is not held in memory.
    """

    def __init__(
        self,
        data: MapData | None,
        batch_size: int,
        seed: int,
        *,
        rows: slice,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.data, self.batch_size, self.rows, self.device, self.workers = data, batch_size, rows, device, workers
        self.order = None if data is None else SampleOrder(len(data), batch_size, seed)
        self._held = None if data is None else _held_tensors(data, device)

    def __call__(self, updates: range) -> Iterator[dict[str, Tensor]]:
        """Batches `{name: [B, ...]}` of this process, one per update."""
        if self.data is None or self.order is None:
            yield from self._numbers(updates)
        elif self._held is not None:
            for update in updates:
                index = self.order.indices(update)[self.rows].to(self.device, non_blocking=True)
                yield {name: tensor[index] for name, tensor in self._held.items()}
        else:
            for batch in self._loaded(updates):
                yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _loaded(self, updates: range) -> Iterator[dict[str, Tensor]]:
        """Batches of the loader; an error of a worker, which quotes a traceback, in one line."""
        batches, update = iter(self._loader(updates)), updates.start
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:  # whatever the data set raises
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
                raise DataError(f"the data of update {update + 1} cannot be read ({reason})") from error
            update += 1
            yield batch

    def _numbers(self, updates: range) -> Iterator[dict[str, Tensor]]:
        for update in updates:
            first = update * self.batch_size
            yield {"index": torch.arange(first + self.rows.start, first + self.rows.stop, device=self.device)}

    def _loader(self, updates: range) -> DataLoader[Any]:
        assert self.data is not None and self.order is not None
        return DataLoader(
            cast(Any, self.data),
            batch_sampler=cast(Any, _UpdateSampler(self.order, self.rows, updates)),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_process_group,
            prefetch_factor=4 if self.workers else None,
        )


def _leave_process_group(worker: int) -> None:
    """Ctrl-C, `torchrun` and `timeout` signal the whole group, but it is the trainer that decides when to stop."""
    os.setpgrp()


def _held_tensors(data: MapData, device: torch.device) -> dict[str, Tensor] | None:
    """All items on the device, or None if the data set does not offer it or is too large."""
    tensors = getattr(data, "tensors", None)
    if tensors is None or len(data) == 0:
        return None
    item = data[0]
    if len(data) * sum(t.numel() * t.element_size() for t in item.values()) > MEMORY_LIMIT:
        return None
    held: Mapping[str, Tensor] = tensors()
    return {name: tensor.to(device) for name, tensor in held.items()}


def split(batch: Mapping[str, Tensor], parts: int) -> Sequence[dict[str, Tensor]]:
    """A batch in equal parts."""
    if parts == 1:
        return [dict(batch)]
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(parts)]
