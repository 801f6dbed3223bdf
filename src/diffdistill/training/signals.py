"""SIGTERM and SIGINT as a request to stop at the next safe place."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

from diffdistill.distributed import from_main, rank, world_size

REQUEUE = signal.SIGUSR2
"""What Slurm sends before the time limit of a job of submitit, whose handler puts the job back into the queue."""

PATIENCE_SECONDS = 2.0
"""After a request to stop, an update that takes longer than this is given up where it can be made again."""

AGREE_SECONDS = 1.0
"""Several processes compare about this often whether one of them was asked to stop."""


class Interrupted(SystemExit):
    """A run that was asked to stop and did, its state saved. Exit code 128 + signal: 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopRequest:
    """Inside the context, the first SIGTERM or SIGINT only sets `signum`; a second one acts as usual.

    SIGUSR2 does the same in a job of submitit, whose handler for it is called after the stop, and after a SIGTERM that
    made room for another job. A signal that comes too late to be answered by `Interrupted` acts as usual when the
    context ends, so that none is lost between two stages of a run. Outside the main thread, where Python handles no
    signals, nothing changes.

    Attributes:
        signum: the signal, or None.
        waits_for: what must end first, for the line on stderr that answers a signal; empty for no line.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.waits_for = ""
        self._asked_at = math.inf
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            waiting = [REQUEUE] if callable(signal.getsignal(REQUEUE)) else []
            for signum in (signal.SIGTERM, signal.SIGINT, *waiting):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    @property
    def overdue(self) -> bool:
        """Whether some seconds have passed since the request: whoever asked should not wait for a slow update."""
        return time.monotonic() > self._asked_at + PATIENCE_SECONDS

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None and self.waits_for and rank() == 0:
            line = (
                f"\n{signal.Signals(signum).name}: waiting for {self.waits_for}; once more ends it at once, unsaved\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # print could be at work already
        self.signum, self._asked_at = signum, min(self._asked_at, time.monotonic())
        self._restore((signal.SIGTERM, signal.SIGINT))  # SIGUSR2 follows SIGTERM when a job is preempted

    def _restore(self, signums: Sequence[int]) -> None:
        for signum in set(signums) & set(self._previous):
            signal.signal(signum, self._previous.pop(signum))  # pyright: ignore[reportArgumentType]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(tuple(self._previous))
        if error is None and self.signum is not None:
            os.kill(os.getpid(), self.signum)
        elif isinstance(error, Interrupted) and callable(signal.getsignal(REQUEUE)):
            if rank() > 0:
                raise SystemExit(0)  # many clusters end all tasks, process 0 too, with the first that fails
            if REQUEUE in (self.signum, error.signum) or preempted(os.environ.get("SLURM_JOB_ID", "")):
                os.kill(os.getpid(), REQUEUE)


class Agreement:
    """About every how many updates several processes compare whether one of them was asked to stop."""

    def __init__(self) -> None:
        self._every = 1

    def due(self, update: int) -> bool:
        """Whether they compare after this update."""
        return update % self._every == 0

    def set(self, updates: int, seconds: float) -> None:
        """Compare about every `AGREE_SECONDS`, as process 0 says, which made so many updates in so many seconds."""
        if world_size() > 1:
            self._every = from_main(max(1, int(AGREE_SECONDS * updates / max(seconds, 1e-6))))


def preempted(job: str) -> bool:
    """Whether Slurm has told a job to make room for another. A job that was cancelled is not RUNNING any more."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    fields = next((line.split() for line in shown.splitlines() if line.startswith(f"JobId={job} ")), [])
    return "JobState=RUNNING" in fields and any(re.match(r"PreemptTime=\d", field) for field in fields)
