"""What a training run optimises: a loss, and the module that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A loss to minimise.

    Attributes:
        value: scalar, the mean over the samples of the batch, so that gradients of equal parts of a batch average.
        logs: further scalars to log, by name; they stay on the device until they are written.
    """

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A loss plus the module that it trains. It knows nothing of files or processes.

    Subclasses set `trained` and define `loss`, or `losses` where a batch makes several optimiser steps. Other modules
    (a frozen teacher) may be attributes too: they move with the objective to its device, stay in eval mode, and are
    not saved. All randomness comes from the generator that is passed in: then a resumed run is the same run. Draws
    made with `diffdistill.training.randomness` also do not depend on how a batch is split into parts or processes.

    Attributes:
        trained: what is optimised, averaged and saved.
        progress: share of the updates that are done, in [0, 1); the trainer sets it before each update.
    """

    trained: nn.Module
    progress: float = 0.0

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """The loss of a batch: tensors `[B, ...]` by name. The generator lives on the device of the batch."""
        raise NotImplementedError(f"{type(self).__name__} defines neither loss(batch, generator) nor losses")

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[Loss]:
        """The losses of a batch; each is followed by an optimiser step before the next is asked for."""
        yield self.loss(batch, generator)

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile what is called, by torch.compile; objectives that set hooks inside a network replace this."""
        for module in self.children():
            module.compile(backend=backend)

    def extra_state(self) -> dict[str, Any]:
        """What belongs in a checkpoint besides the weights of `trained`: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave; tensors come on the CPU."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {', '.join(state)}")

    def train(self, mode: bool = True) -> Objective:
        """Switch only `trained`: what is frozen stays in eval mode."""
        super().train(False)
        self.trained.train(mode)
        return self
