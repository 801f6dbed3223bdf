"""SIGTERM and SIGINT as a request to stop at the next safe place."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(SystemExit):
    """A run that was asked to stop and did, its state saved. Exit code 128 + signal: 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopRequest:
    """Inside the context, the first SIGTERM or SIGINT only sets `signum`; a second one acts as usual.

    Outside the main thread, where Python handles no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
