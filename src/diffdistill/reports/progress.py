"""Progress of long loops: a bar in terminals and notebooks, lines of the log where there is neither."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines of the log."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left"

logger = logging.getLogger(__name__)


def progress(iterable: Any = None, *, hidden: bool = False, **options: Any) -> tqdm[Any]:
    """A `tqdm` over `iterable`, or one that is updated by hand.

    Args:
        iterable: what is gone through, or None.
        hidden: show nothing, as in all processes but one.
        options: of `tqdm`, such as `total`, `desc` and `unit`.
    """
    if hidden:
        return tqdm(iterable, disable=True, **options)
    if shows_bars():
        return tqdm(iterable, **options)
    return _Lines(iterable, file=io.StringIO(), mininterval=SECONDS, delay=SECONDS, bar_format=LINE, **options)


def shows_bars() -> bool:
    """Whether a bar can be seen: in a terminal, or in a notebook, whose output is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


class _Lines(tqdm):
    """Progress as lines of the log, the first one after `SECONDS`."""

    monitor_interval = 0  # no thread that looks after the interval

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if 0 < self.n < (self.total or self.n + 1):
            logger.info("%s", str(self))
