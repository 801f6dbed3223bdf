"""SIGTERM and SIGINT as a request to stop at the next safe place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType

REQUEUE = signal.SIGUSR2
"""What Slurm sends before the time limit of a job of submitit, whose handler puts the job back into the queue."""


class Interrupted(SystemExit):
    """A run that was asked to stop and did, its state saved. Exit code 128 + signal: 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopRequest:
    """Inside the context, the first SIGTERM or SIGINT only sets `signum`; a second one acts as usual.

    SIGUSR2 does the same where a handler waits for it, which is called after the stop. A signal that comes too late to
    be answered by `Interrupted` acts as usual when the context ends, so that none is lost between two stages of a run.
    Outside the main thread, where Python handles no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            waiting = [REQUEUE] if callable(signal.getsignal(REQUEUE)) else []
            for signum in (signal.SIGTERM, signal.SIGINT, *waiting):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore((signal.SIGTERM, signal.SIGINT))  # SIGUSR2 follows SIGTERM when a job is preempted

    def _restore(self, signums: Sequence[int]) -> None:
        for signum in set(signums) & set(self._previous):
            signal.signal(signum, self._previous.pop(signum))  # pyright: ignore[reportArgumentType]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(tuple(self._previous))
        requeue = isinstance(error, Interrupted) and self.signum == REQUEUE
        if self.signum is not None and (error is None or requeue):
            os.kill(os.getpid(), self.signum)
