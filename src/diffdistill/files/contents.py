"""What files hold, as digests: two that hold the same are the same, wherever they lie."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from diffdistill.files.hashes import sha256

CONTENTS = "contents"
"""The entry, of what identifies something that is made, with the digests of the files that it is made from."""
SMALL = 2**26
"""Bytes that are read again each time rather than trusted by their times."""
SETTLED_SECONDS = 2.0
"""A file that was written less than this ago may be written again within the resolution of its time."""
JUNK = ("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir")
"""What systems leave in folders, in lower case, beside what begins with a point."""


@dataclass(frozen=True)
class Content:
    """What a file, or the files of a folder, held when they were read.

    Attributes:
        digest: of their bytes and, within the folder, their names.
        stamp: of their names, sizes and times; None where these do not show yet whether they are written again.
    """

    digest: str
    stamp: str | None = None


def is_junk(name: str) -> bool:
    """Whether a file or folder was left by a system, such as `.ipynb_checkpoints`, `._a.png` or `Thumbs.db`."""
    return name.startswith(".") or name.lower() in JUNK


def files_within(path: str | os.PathLike[str]) -> list[Path]:
    """A file by itself, or all files of a folder and those within it, without junk, in the order of their names."""
    return sorted(_walk(Path(path))) if Path(path).is_dir() else [Path(path)]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_junk(name)]
        yield from (Path(place, name) for name in names if not is_junk(name))


def content_of(files: Sequence[Path], known: Content | None = None) -> Content:
    """The content of files.

    Args:
        files: paths; only their names below the folder that holds them all count.
        known: what they held before. Where there is much to read, it is taken over if no size and no time has changed.

    Raises:
        OSError: a file cannot be read.
    """
    base = Path(os.path.commonpath([file.parent for file in files]))
    names = [os.fspath(file.relative_to(base)) if len(files) > 1 else "" for file in files]
    facts = [file.stat() for file in files]
    stamp = _digest(
        f"{name} {fact.st_size} {fact.st_mtime_ns} {fact.st_ctime_ns} {fact.st_ino}"
        for name, fact in zip(names, facts, strict=True)
    )
    if known is not None and known.stamp == stamp and sum(fact.st_size for fact in facts) > SMALL:
        return known
    settled = max(fact.st_ctime for fact in facts) < time.time() - SETTLED_SECONDS
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter
        hashes = threads.map(sha256, files)
        digest = _digest(f"{name} {value}" for name, value in zip(names, hashes, strict=True))
    return Content(digest, stamp if settled else None)


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
