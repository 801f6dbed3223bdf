"""Modules whose parameters are split over the processes (FSDP2), and the whole tensors that files hold.

A checkpoint holds whole tensors under the names of one process, so that any number of processes can read it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
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
    """Split the parameters of every block over all processes; `module` must then be used by calling it."""
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


def whole(value: Any, *, keep: bool = True) -> Any:
    """Nested dicts and lists with split tensors put together, on the CPU. All processes must call it.

    With `keep=False` this process takes part, but gets None in place of those tensors.
    """
    if isinstance(value, Mapping):
        return {name: whole(item, keep=keep) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, keep=keep) for item in value)
    if not is_split(value):
        return value
    tensor = value.full_tensor().detach()
    return tensor.cpu() if keep else None


def summed(tensor: Tensor) -> Tensor:
    """A split scalar, such as a norm, as one number in every process."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def split_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, split as `model` is."""
    if not is_split(model):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # pyright: ignore[reportAttributeAccessIssue]
    # Every process has read the whole tensor: nothing is sent.
    return distribute_tensor(value.to(model.device), mesh, placements, src_data_rank=None)


def load_module(module: nn.Module, state: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
    """`module.load_state_dict`, strictly, of whole tensors; the entries named in `keep` stay as they are."""
    own = module.state_dict()
    kept = {name: own[name] for name in keep}
    module.load_state_dict({**kept, **{n: split_like(v, own[n]) if n in own else v for n, v in state.items()}})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole tensors; settings such as `betas` stay the optimizer's own."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {i: {k: _placed(v, parameters[i]) for k, v in moments.items()} for i, moments in state["state"].items()}
    optimizer.load_state_dict({**state, "state": values})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _placed(value: Any, parameter: Tensor) -> Any:
    """A moment of a parameter, split as it is; counts and the like stay as they are."""
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    return split_like(value, parameter) if alike else value


def gather_into(target: nn.Module, source: nn.Module) -> nn.Module:
    """Give `target` the weights of the split `source`. All processes must call it, and each gets them."""
    target.load_state_dict(whole(source.state_dict()))
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
