"""Trackers of experiments, which are told what a run writes: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import diffdistill.distributed as distributed
from diffdistill.registry import choose
from diffdistill.training.callbacks import Callback

if TYPE_CHECKING:
    from diffdistill.training.run import Run
    from diffdistill.training.trainer import Trainer

EXTRA = 'pip install "diffdistill[trackers]"'
NOT_CURVES = ("update", "samples", "seconds")


class Tracker(Callback):
    """Passes on the numbers of the log and the sample grids of a run, from process 0 alone."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        """Take the losses, rates and other numbers of an update."""
        raise NotImplementedError

    def picture(self, update: int, path: Path) -> None:
        """Take a grid of samples, a PNG."""
        raise NotImplementedError

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        if distributed.rank() == 0:
            self.numbers(record["update"], {n: v for n, v in record.items() if n not in NOT_CURVES})

    def on_update(self, trainer: Trainer) -> None:
        grid = trainer.run.path / "samples" / f"{trainer.update:07d}.png"
        if distributed.rank() == 0 and grid.name not in self._shown and grid.is_file():
            self._shown.add(grid.name)
            self.picture(trainer.update, grid)

    def close(self) -> None:
        """Write what is held back. Called at the end of a run, however it ends."""


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the run, without what a run that was continued makes again.

    Args:
        run: the run.
        update: the update that it goes on from.
    """

    def __init__(self, run: Run, update: int) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError(f"log_to=[tensorboard] needs an extra: {EXTRA} ({error})") from None
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=update + 1 if update else None)
        config = json.dumps(run.config, indent=2)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), update)

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def picture(self, update: int, path: Path) -> None:
        self._writer.add_image("samples", _pixels(path), update, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases in the project "diffdistill", or in that of the variable WANDB_PROJECT.

    Its own variables say where it goes: WANDB_MODE=offline keeps it in `wandb/` of the run. A continued run goes on in
    the same one.
    """

    def __init__(self, run: Run, update: int) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"log_to=[wandb] needs an extra: {EXTRA} ({error})") from None
        self._wandb: Any = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "diffdistill"),
            name=run.path.name,
            id=run.digest,
            dir=str(run.path),
            config=run.config,
            resume="allow",
        )

    def numbers(self, update: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=update)

    def picture(self, update: int, path: Path) -> None:
        self._run.log({"samples": self._wandb.Image(_pixels(path))}, step=update)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Any, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


@contextmanager
def tracked(trainer: Trainer) -> Iterator[None]:
    """Tell the trackers of `trainer.config.log_to` what goes on within the block, in process 0 alone.

    Raises:
        ImportError: the package of one is missing.
    """
    with ExitStack() as stack:
        if distributed.rank() == 0:
            for name in trainer.config.log_to:
                tracker = choose("tracker", name, TRACKERS)(trainer.run, trainer.update)
                stack.callback(tracker.close)
                trainer.callbacks.append(tracker)
                stack.callback(trainer.callbacks.remove, tracker)
        yield


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))
