"""What the library notes in its log, such as what was found in a folder, shown to who runs a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from diffdistill.distributed import rank


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Show each note in one line on stderr, by process 0 alone."""
    log, handler = logging.getLogger("diffdistill"), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
