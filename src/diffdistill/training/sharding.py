"""Modules whose parameters are split over the processes (FSDP2), and how their state is written and read.

Each process holds some rows of every parameter, and writes those; any number of processes can read them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists and dicts of modules: what a network is made of, level by level."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from child.children()
        else:
            yield from blocks(child)


def shard(module: nn.Module, device: torch.device) -> None:
    """Split the parameters of every block over all processes; `module` must then be used by calling it.

    Raises:
        ValueError: with PyTorch 2.6, whose backward pass finds its split weights overwritten.
    """
    if torch.__version__ < "2.7":
        raise ValueError(
            f"trainer.parallel=fsdp needs a PyTorch later than {torch.__version__}: update it, or choose ddp"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 refuses weights in the channels-last layout
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(module):
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def reduce_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a split module averages its gradients over the processes."""
    switch = getattr(module, "set_requires_gradient_sync", None)
    if switch is not None:
        switch(wanted)


def is_split(tensor: Any) -> bool:
    """Whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import takes long


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process; it shares memory with the tensor."""
    return tensor.to_local() if is_split(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def full_tensor(tensor: Tensor) -> Tensor:
    """A split tensor put together, which all processes must call; any other as it is."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


Place = tuple[Any, ...]
"""Where a value lies in nested dicts: the keys from the outermost inwards."""


def separate(state: Any, place: Place = ()) -> tuple[Any, dict[Place, Tensor]]:
    """Nested dicts with None in place of their split tensors, and the pieces of those that this process holds."""
    if is_split(state):
        piece = local(state).detach()
        padded = piece.untyped_storage().nbytes() > piece.nbytes  # FSDP2 pads the last pieces; a file would hold that
        return None, {place: piece.clone() if padded else piece}
    if not isinstance(state, Mapping):
        return state, {}
    separated = {key: separate(value, (*place, key)) for key, value in state.items()}
    common = {key: value for key, (value, _) in separated.items()}
    return common, {place: piece for _, pieces in separated.values() for place, piece in pieces.items()}


def join(common: Any, parts: Sequence[Mapping[Place, Tensor]]) -> Any:
    """Undo `separate`, given the pieces of all processes in their order: split tensors come as `Pieces`."""
    for *above, key in parts[0]:
        inner = common
        for outer in above:
            inner = inner[outer]
        inner[key] = Pieces(tuple(part[(*above, key)] for part in parts))
    return common


@dataclass(frozen=True)
class Pieces:
    """A tensor whose rows lie in several tensors, one after the other."""

    pieces: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size((sum(len(piece) for piece in self.pieces), *self.pieces[0].shape[1:]))

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of its rows, as a new tensor; other pieces are not looked at."""
        found, first = [], 0
        for piece in self.pieces:
            found.append(piece[max(start - first, 0) : max(stop - first, 0)])
            first += len(piece)
        return torch.cat(found)


def taken(saved: Tensor | Pieces, model: Tensor) -> Tensor:
    """A new tensor with what a saved one holds for this process: the rows that it has of `model`, or all."""
    if not is_split(model):
        return saved.rows(0, saved.shape[0]) if isinstance(saved, Pieces) else saved.clone()
    rows = model.shape[0]
    most = -(-rows // dist.get_world_size())  # as torch.chunk splits them
    start, stop = (min(place * most, rows) for place in (dist.get_rank(), dist.get_rank() + 1))
    return (saved if isinstance(saved, Pieces) else Pieces((saved,))).rows(start, stop)


@torch.no_grad()
def load_module(module: nn.Module, state: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
    """Copy what was saved of a module into it, one tensor at a time; the entries named in `keep` stay as they are.

    Raises:
        ValueError: the names or the shapes are not those of the module.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if name not in keep}
    if others := [*(own.keys() - state.keys()), *(state.keys() - own.keys())]:
        raise ValueError(f"not in both: {', '.join(sorted(others))}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(state[name].shape)} instead of {list(tensor.shape)}")
        local(tensor).copy_(taken(state[name], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of what was saved; settings such as `betas` stay the optimizer's own."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {i: {k: _moment(v, parameters[i]) for k, v in moments.items()} for i, moments in state["state"].items()}
    optimizer.load_state_dict({**state, "state": values})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _moment(value: Any, parameter: Tensor) -> Any:
    """A moment of a parameter, laid out and split as it is; counts and the like as they are."""
    if not isinstance(value, (Tensor, Pieces)) or value.shape != parameter.shape:
        return value
    saved = taken(value, parameter)
    moment = torch.empty_like(parameter, dtype=saved.dtype)
    local(moment).copy_(saved)
    return moment


@torch.no_grad()
def gather_into(target: nn.Module, source: nn.Module) -> nn.Module:
    """Give `target` the weights of the split `source`. All processes must call it, and each gets them."""
    own = target.state_dict()
    for name, tensor in source.state_dict().items():
        own[name].copy_(full_tensor(tensor))
    return target


def copy_on_cpu(module: nn.Module) -> nn.Module:
    """A copy of a module that is not split yet, to hold the result."""
    return copy.deepcopy(module).to("cpu")


def recompute(module: nn.Module) -> None:
    """Gradient checkpointing: keep no activations inside the blocks of `module`, compute them again in the backward."""
    for block in blocks(module):
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
