"""Foreign checkpoints, read as data: nothing that a file carries is executed."""

from __future__ import annotations

import os

from diffdistill.interop.building import Found
from diffdistill.interop.checkpoints import open_checkpoint, read_arrays
from diffdistill.interop.edm import read_edm
from diffdistill.interop.records import ForeignFileError, UnsafePickleError

__all__ = ["ForeignFileError", "Found", "UnsafePickleError", "open_checkpoint", "read_arrays", "read_foreign"]


def read_foreign(path: str | os.PathLike[str]) -> Found:
    """Read a foreign checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return read_edm(checkpoint)
