"""Whether files may be fetched, where they are kept, and what they were when they were fetched first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffdistill.files.atomic import write_text

CONSENT_VARIABLE = "DIFFDISTILL_FETCH"
CACHE_VARIABLE = "DIFFDISTILL_CACHE"

_CONSENT: ContextVar[bool | None] = ContextVar("consent", default=None)


class FetchError(ValueError):
    """What was named cannot be had from elsewhere; the message is one line."""


@contextmanager
def consent(fetch: bool = True) -> Iterator[None]:
    """Agree within a `with` statement that files are fetched; `DIFFDISTILL_FETCH=1` does for a whole process."""
    token = _CONSENT.set(fetch)
    try:
        yield
    finally:
        _CONSENT.reset(token)


def may_fetch() -> bool:
    """Whether the user agreed that files are fetched."""
    given = _CONSENT.get()
    return os.environ.get(CONSENT_VARIABLE, "") in ("1", "true", "yes") if given is None else given


def check_consent(name: str, what: str, size: int | None) -> None:
    """Raise `FetchError`, which says what would be fetched, unless the user agreed."""
    if not may_fetch():
        raise FetchError(
            f"{name} is not on this machine: it would be fetched, {what}, {shown_size(size)}; agree by fetch=true, "
            f"or {CONSENT_VARIABLE}=1"
        )


def shown_size(size: int | None) -> str:
    """Bytes for people."""
    if size is None:
        return "of unknown size"
    unit = next((unit for unit in ("B", "kB", "MB") if size < 1000 ** (1 + ["B", "kB", "MB"].index(unit))), "GB")
    return f"{size / 1000 ** ['B', 'kB', 'MB', 'GB'].index(unit):.3g} {unit}"


def cache_folder() -> Path:
    """Where fetched files are kept: `DIFFDISTILL_CACHE`, by default in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffdistill"


def check_space(folder: Path, size: int | None, name: str) -> None:
    """Raise `FetchError` if the disk has no room for `size` bytes more."""
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise FetchError(f"no space for {name}: it needs {shown_size(size)}, and {folder} has {shown_size(free)} left")


class Pins:
    """What names stood for when they were fetched first: commits and hashes, in one file of the cache."""

    def __init__(self) -> None:
        self.path = cache_folder() / "pins.json"

    def get(self, name: str) -> dict[str, Any]:
        """The record of a name, or an empty one.

        Raises:
            FetchError: the file of the records is damaged.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise FetchError(f"{self.path} is damaged: remove it, and what it says is found out anew") from None
        return dict(found.get(name, {})) if isinstance(found, dict) else {}

    def set(self, name: str, record: dict[str, Any]) -> None:
        """Write a record, while no other process does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            everything = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            write_text(self.path, json.dumps({**everything, name: record}, indent=2) + "\n")
