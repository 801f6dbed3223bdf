"""The optional package, and what its absence says."""

from __future__ import annotations

import importlib
from typing import Any

EXTRA = 'pip install "diffdistill[diffusers]"'


def diffusers(module: str = "diffusers") -> Any:
    """The package diffusers, or a module of it or of transformers.

    Raises:
        ImportError: it is not installed; one sentence that names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"models and pipelines of diffusers need an extra: {EXTRA} ({error})") from None
