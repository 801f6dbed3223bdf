"""Files of arrays, read as data."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def open_npz(path: str | os.PathLike[str], *, what: str) -> Iterator[Any]:
    """Open an `.npz` for reading; nothing is unpickled, and arrays are read when asked for.

    Args:
        path: the file.
        what: it should hold, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an `.npz`, a damaged one, or one with Python objects.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} at {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
