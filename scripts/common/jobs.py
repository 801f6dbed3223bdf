"""Commands that become jobs of Slurm, or of this machine, through hydra-submitit-launcher."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from common.errors import USER_ERRORS, from_submitit, one_line


@contextmanager
def errors_in_the_log() -> Iterator[None]:
    """Show progress and errors in the log of a submitted job, whose exit code then is 2.

    The command that submitted it gets errors too, in a form that travels.
    """
    log = logging.StreamHandler()
    log.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("diffdistill").addHandler(log)
    logging.getLogger("diffdistill").setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        if isinstance(error, USER_ERRORS) or from_submitit(error):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        atexit.register(os._exit, 2)  # Hydra and submitit end well, having passed the error on
        raise ValueError(one_line(error)) from None


class Submission(Callback):
    """Says that a command becomes jobs, and where their logs will be."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before anything is submitted."""
        folder = Path(config.hydra.sweep.dir, ".submitit").resolve()
        print(f"submitting; the log of job N will be {folder}/N/N_0_log.out", flush=True)
