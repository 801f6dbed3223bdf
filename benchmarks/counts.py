"""What a network costs by counting: parameters, operations, and the activations that training keeps.

    python benchmarks/counts.py

Nothing is computed: tensors are PyTorch's fake ones, of a shape without content, so that the numbers hold for every
machine. One operation is a multiplication or an addition, as PyTorch's FlopCounterMode counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffdistill.models.network import NetworkDenoiser
from diffdistill.training.sharding import recompute
from networks import bare, network

HEADER = "| network | parameters, M | evaluation, GFLOP | kept activations, MiB | the same, recomputed, MiB |"


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass while it is entered, parameters left out."""

    def __init__(self, parameters: set[int]) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.parameters = parameters
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.parameters:
            self.tensors.setdefault(key, tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def kept(denoiser: NetworkDenoiser) -> float:
    """MiB of float32 activations kept for one sample: the difference between a batch of two and of one."""
    sizes = []
    for batch in (1, 2):
        hooks = Kept({p.untyped_storage()._cdata for p in denoiser.parameters()})
        with hooks:
            bare(denoiser.train(), batch)()
        sizes.append(hooks.bytes)
    return (sizes[1] - sizes[0]) / 2**20


def counts(name: str, resolution: int | None = None) -> tuple[float, float, float, float]:
    """Millions of parameters, 1e9 operations of one evaluation, and MiB kept per sample without and with recompute."""
    denoiser = network(name, resolution)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bare(denoiser, 1)()
    plain = kept(denoiser)
    recompute(denoiser)
    parameters = sum(p.numel() for p in denoiser.parameters()) / 1e6
    return parameters, counter.get_total_flops() / 1e9, plain, kept(denoiser)


def main() -> None:
    print(HEADER)
    print("|---|---|---|---|---|")
    for name in ("digits", "ddpmpp_cifar10", "adm_imagenet64", "unet2d_cifar10", "sd15_unet"):
        for resolution in (None, 64) if name == "ddpmpp_cifar10" else (None, 32) if name == "sd15_unet" else (None,):
            label = name if resolution is None else f"{name} at {resolution}x{resolution}"
            with FakeTensorMode():
                numbers = counts(name, resolution)
            print(f"| {label} | " + " | ".join(f"{value:.4g}" for value in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
