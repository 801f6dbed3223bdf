"""Devices by name, and how they convolve."""

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


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms at the first call of a shape, and keep the fastest. Results change by rounding."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
