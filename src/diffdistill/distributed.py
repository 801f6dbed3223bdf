"""What the trainer needs of several processes; every function is trivial when there is one.

Processes are those of torch.distributed, once it is initialised (by `torchrun` or Slurm, and the script).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from diffdistill.errors import one_line

BUCKET_BYTES = 32 * 2**20
JOIN_MINUTES = 10.0
"""How long a process waits for the others to start."""

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process ended or cannot be reached, so that this one cannot go on; the message is one line."""


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that `torchrun`, or Slurm, started, each on its own GPU where there are any.

    Nothing is done when alone.

    Raises:
        LostProcessError: a process did not start, or ended before the block did.
    """
    if world_size() == 1:
        os.environ.update(slurm_place(os.environ))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    if torch.cuda.is_available():
        # Slurm may show each task its own GPU alone, which is then number 0.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    _join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        raise LostProcessError(f"another process ended or cannot be reached ({_reason(error)})") from error
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Alone, `init_process_group` would wait for half an hour for a process that does not start."""
    try:
        store, place, count = next(rendezvous("env://", timeout=timedelta(minutes=JOIN_MINUTES)))
        dist.init_process_group(backend, store=store, rank=place, world_size=count)
    except RuntimeError as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        raise LostProcessError(f"another process ended or cannot be reached ({_reason(error)}); {where}") from error


def _reason(error: RuntimeError) -> str:
    """What torch says went wrong: "[SOURCE FILE:LINE] REASON. This is typically ..."."""
    return re.sub(r"^\[\S*\] |\. This is .*", "", one_line(error))


def slurm_place(environment: Mapping[str, str]) -> dict[str, str]:
    """What `torchrun` would set for a task of a Slurm step of several; nothing for one task, or under `torchrun`.

    MASTER_ADDR and MASTER_PORT stay as they are where they are set.
    """
    count = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if count == "1" or "RANK" in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": count,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
    }


def _port(environment: Mapping[str, str]) -> int:
    """A port below those that Linux gives away, another for each step of a job and for the jobs of an array."""
    return 12_000 + (int(environment["SLURM_JOB_ID"]) + 1009 * int(environment["SLURM_STEP_ID"])) % 20_000


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's form, such as `gpu[003-007,012],login`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]+\])+", nodes)
    if found is None:
        raise ValueError(f"{nodes!r} is no list of hosts")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; process 0 is the one that writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_main(value: T) -> T:
    """Broadcast a value from process 0 to all processes, as a pickle."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Gather one value from each process, in the order of ranks, in every process. They are sent as pickles."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The maximum of an integer over the processes."""
    return max(gather(value))


@torch.no_grad()
def same_weights(module: nn.Module) -> None:
    """Broadcast the parameters and buffers of process 0."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)


class GradientAverage:
    """Averages gradients over the processes, in flat buckets that are sent while the backward pass goes on.

    The gradients of the last layers are ready first, so that buckets are filled from the end; they are sent in that
    order in every process. DistributedDataParallel would want the network called through its wrapper, once for each
    backward pass, and rebuilds its buckets after the first one, so that a resumed run might add in another order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets = list(_buckets(list(reversed(parameters)))) if world_size() > 1 else []
        self._ready: set[nn.Parameter] = set()
        self._sent: list[tuple[list[Tensor], Tensor, Any]] = []

    @contextlib.contextmanager
    def during_backward(self, last: bool) -> Iterator[None]:
        """Around a backward pass; gradients are sent in the last one of an update."""
        if not self._buckets or not last:
            yield
            return
        hooks = [p.register_post_accumulate_grad_hook(self._arrived) for bucket in self._buckets for p in bucket]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        self._ready.add(cast(nn.Parameter, parameter))
        while len(self._sent) < len(self._buckets) and self._ready.issuperset(self._buckets[len(self._sent)]):
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        gradients = [p.grad for p in self._buckets[len(self._sent)] if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) if gradients else torch.empty(0)
        self._sent.append((gradients, flat, dist.all_reduce(flat, async_op=True) if gradients else None))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, of parameters that the loss did not use, and wait for the means."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for gradients, flat, work in self._sent:
            if work is not None:
                work.wait()
                parts = (flat / world_size()).split([g.numel() for g in gradients])
                means = [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]
                torch._foreach_copy_(gradients, means)
        self._sent.clear()
        self._ready.clear()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and of about `BUCKET_BYTES`."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
