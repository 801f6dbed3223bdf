"""Models of the caller's, used for a while and given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from diffdistill.devices import device_of


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Afterwards device, layout, mode and `requires_grad` of a module are as before. Weights are not looked at."""
    device = device_of(module)
    modes = [(part, part.training) for part in module.modules()]
    parameters = [(p, p.requires_grad, p.stride()) for p in module.parameters()]
    try:
        yield
    finally:
        module.to(device)
        for part, mode in modes:
            part.training = mode
        for parameter, wanted, stride in parameters:
            parameter.requires_grad_(wanted)
            if parameter.stride() != stride:
                parameter.data = parameter.data.new_empty_strided(parameter.shape, stride).copy_(parameter.data)
