"""The exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffdistill.training.sharding import local


class WeightAverage:
    """A copy of a module whose parameters follow the module's, where they are trained; its buffers are the module's.

    Args:
        source: the module to follow.
        module: a copy of it to begin with, split over the processes as `source` is; by default one is made.

    Attributes:
        module: the averaged copy; it takes no gradient.
    """

    def __init__(self, source: nn.Module, module: nn.Module | None = None) -> None:
        self.module = (copy.deepcopy(source) if module is None else module).eval()
        pairs = zip(self.module.parameters(), source.parameters(), strict=True)
        followed = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self._to: list[Tensor] = [average for average, _ in followed]
        self._from: list[Tensor] = [parameter for _, parameter in followed]
        self.module.requires_grad_(False)
        self._buffers_to, self._buffers_from = list(self.module.buffers()), list(source.buffers())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """`average <- decay * average + (1 - decay) * weights`."""
        torch._foreach_lerp_([local(p) for p in self._to], [local(p) for p in self._from], 1.0 - decay)
        if self._buffers_to:
            torch._foreach_copy_(self._buffers_to, self._buffers_from)
