"""Callbacks of a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import diffdistill.distributed as distributed
from diffdistill.errors import one_line
from diffdistill.reports.plots import plot_curves
from diffdistill.reports.previews import save_samples

if TYPE_CHECKING:
    from diffdistill.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Callback:
    """Subclasses override what they need. Every process calls every callback, in the order in which they were given."""

    def on_update(self, trainer: Trainer) -> None:
        """After every update, of which `trainer.update` were made."""

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        """After a line of metrics.jsonl was written, with what it holds."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last update; not after an interruption."""


class OnLog(Callback):
    """A function `(trainer, record)` that is called after every line of metrics.jsonl."""

    def __init__(self, function: Callable[[Trainer, Mapping[str, Any]], object]) -> None:
        self.function = function

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        self.function(trainer, record)


def as_callback(given: Any) -> Callback:
    """A callback as it is, or a function of the trainer and a line of the log as one.

    Raises:
        TypeError: neither.
    """
    if isinstance(given, Callback):
        return given
    if callable(given) and not isinstance(given, type):
        return OnLog(given)
    raise TypeError(f"callbacks are training.Callback objects, or functions (trainer, record), not {given!r}")


class Pictures(Callback):
    """Draws samples in `samples/` and the curves of the metrics, every `sample_every` updates and in the end.

    Args:
        draw: maps the model to samples, or None to draw curves alone.
    """

    def __init__(self, draw: Callable[[nn.Module], Tensor] | None) -> None:
        self.draw = draw

    def on_update(self, trainer: Trainer) -> None:
        every = trainer.config.sample_every
        if trainer.update != trainer.config.updates and not (every and trainer.update % every == 0):
            return
        main = distributed.rank() == 0
        if self.draw is not None and every is not None and (main or trainer.splits):
            training = trainer.model.training
            try:
                with torch.no_grad():
                    samples = self.draw(trainer.model.eval())  # a split model is evaluated by all processes together
                if main:
                    save_samples(samples, trainer.run.path / "samples" / f"{trainer.update:07d}.png")
            except Exception as error:  # of any kind: a run is worth more than its pictures
                logger.warning("no samples are drawn from here on, because drawing them failed: %s", one_line(error))
                self.draw = None
            trainer.model.train(training)
        if main:
            plot_curves(trainer.run.metrics(), trainer.run.path / "curves.png")
        distributed.barrier()
