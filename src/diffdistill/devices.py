"""Devices by name, what they compute fast, and how they convolve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(name: str | nn.Module) -> torch.device:
    """The device of that name: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ..., or that of a module.

    Raises:
        ValueError: an unknown name, or a device that is not there.
    """
    if isinstance(name, nn.Module):
        return next((p.device for p in name.parameters()), torch.device("cpu"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # others have no float64, or compute nothing
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, but is {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} is not there: PyTorch sees no CUDA GPU; choose cpu or auto")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; any other computes it by way of float32, many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # PyTorch's own kernels, which the user may hold to AVX2
        return False
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in known)


def channels_last(module: nn.Module) -> nn.Module:
    """Store the weights of two-dimensional convolutions in the channels-last layout, in place; returns `module`.

    Modules with the attribute `keeps_layout`, and all that they hold, are left as they are.
    """
    if not getattr(module, "keeps_layout", False):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        for child in module.children():
            channels_last(child)
    return module


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms at the first call of a shape, and keep the fastest. Results change by rounding."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
