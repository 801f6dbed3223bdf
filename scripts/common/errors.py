"""Errors of one line with exit code 2."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from common.arguments import preset_folders
from common.usage import names_of
from diffdistill.distributed import LostProcessError
from diffdistill.training import DataError, NonFiniteLossError

TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    DataError,
    LostProcessError,
    NonFiniteLossError,
    torch.OutOfMemoryError,
    HydraException,
    OmegaConfBaseException,
)
SAME_ERROR_SECONDS = 5.0


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line and exit code 2 at an error that the user can mend, and with 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        if TRACEBACK:
            raise
        print(f"interrupted{'; what was submitted goes on' * from_submitit(error)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except USER_ERRORS as error:
        if TRACEBACK:
            raise
        here = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")
        # torchrun ends the rest once a process has ended: so an error of all is shown by the first, and a cause of its
        # own in one process before what it brings about in the others.
        later = 2 if isinstance(error, LostProcessError) else 1 if here else 0
        time.sleep(later * SAME_ERROR_SECONDS)
        print(f"error{f' in process {here}' if here else ''}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if TRACEBACK or not from_submitit(error):
            raise
        print(f"error: {about_a_job(error)}", file=sys.stderr)
        sys.exit(2)


def from_submitit(error: BaseException) -> bool:
    """Whether an error was raised while this command submitted a job or waited for it."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("submitit.") for frame, _ in frames)


def about_a_job(error: Exception) -> str:
    """An error of submitit in one line: that Slurm refused the job, or how it ended, with the last line of its log."""
    if isinstance(error.__cause__, subprocess.CalledProcessError):
        return "the job was not submitted, for the reason above"
    ended, *log = re.split(r"\n-{10,}\n?", str(error))
    return f"{' '.join(ended.split())} {''.join(log[:1]).strip().rpartition(chr(10))[2]}".strip()


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for a missing preset, with those there are."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        if error.missing_cfg_file.startswith("hydra/launcher/submitit"):
            return 'jobs need hydra-submitit-launcher, which is not installed: pip install -e ".[slurm]"'
        group, _, name = error.missing_cfg_file.partition("/")
        return f"unknown {group} {name!r}: choose one of {', '.join(names_of(group, preset_folders(sys.argv[1:])))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give {error.full_key}=VALUE"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(lines).replace("\t", ", ") or type(error).__name__
