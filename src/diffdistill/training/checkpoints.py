"""The checkpoints of a run: of one file, or, where the model is split over processes, of a part from each of them.

A checkpoint counts only once its record is there, `0001000.json`, which is written last and holds the size and SHA-256
of its files: `0001000.pt`, or `0001000.1of2.pt` and so on. Any number of processes reads either kind.
`torch.distributed.checkpoint` keeps no hashes and unpickles its metadata, which may be a stranger's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.distributed import barrier, from_main, gather, rank, world_size
from diffdistill.errors import one_line
from diffdistill.files.atomic import replacing, write_text
from diffdistill.files.hashes import sha256
from diffdistill.training import sharding

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `update` updates.

    Attributes:
        update: number of updates.
        state: nested dicts and lists. Tensors lie on the CPU, in the file until they are looked at; those that were
            split over processes are `sharding.Pieces`.
        path: its file, or its record where it has parts.
    """

    update: int
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints in a folder. All processes call `save` and `load` together, and fail together.

    Args:
        folder: it is made by the first checkpoint.
        configs: digests of the configurations whose checkpoints are this run's; first the one it has now. None, to
            read those of any.
    """

    def __init__(self, folder: Path, configs: Sequence[str] | None = None) -> None:
        self.folder, self.configs = folder, configs

    def save(self, update: int, state: Mapping[str, Any], *, keep: int) -> Path:
        """Write a checkpoint, then remove all but the last `keep`.

        Raises:
            CheckpointError: a process could not write its part; earlier checkpoints are untouched.
        """
        config = self.configs[0] if self.configs else ""
        common, pieces = sharding.separate(state)
        main, record = rank() == 0, self._record_path(update)
        path = record.with_suffix(f".{rank() + 1}of{world_size()}.pt" if pieces else ".pt")
        failed, written = f"could not write the checkpoint {path}", {}
        try:
            with _together(failed):
                if main:
                    record.unlink(missing_ok=True)
                if pieces:
                    written = _write(path, {"common": common if main else {}, "pieces": pieces})
                elif main:
                    written = _write(path, dict(state))
            written = {"parts": dict(gather((path.name, written)))} if pieces else written
            with _together(failed):
                if main:
                    write_text(record, json.dumps({"update": update, **written, "config": config}) + "\n")
        except CheckpointError as error:
            if main:
                record.unlink(missing_ok=True)
            if main or pieces:
                path.unlink(missing_ok=True)
            last = self.newest()
            left = f"the last good one is {last}" if last else "there is none before it"
            raise CheckpointError(f"{error}: {left}") from error
        if main:
            self.prune(keep, newest=update)
        barrier()
        return record if pieces else path

    def load(self, update: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, or that of an update, whose files are as they were written; None if there is none.

        A damaged one is passed over with a warning; the one before it is taken. Every file is verified by one process.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or one was written by another run.
        """
        updates = from_main([u for u in self._updates() if update in (None, u)])
        for update in reversed(updates):
            record = from_main(self._record(update))
            path = self._path(update, record)
            if self.configs is not None and record.get("config", self.configs[0]) not in self.configs:
                raise CheckpointError(
                    f"the checkpoint {path} was written by a run of other settings: remove what is not of this run"
                )
            try:
                return Checkpoint(update, self._read(path, record), path)
            except CheckpointError as error:
                if rank() == 0:
                    logger.warning("%s; going back to the checkpoint before it", error)
        if updates:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: remove it to start again")
        return None

    def newest(self) -> Path | None:
        """The path of the newest complete checkpoint, or None."""
        updates = self._updates()
        return self._path(updates[-1], self._record(updates[-1])) if updates else None

    def prune(self, keep: int, newest: int | None = None) -> None:
        """Remove all but the last checkpoints up to `newest` (later ones are damaged), and what crashes left behind.

        Process 0 alone calls it.
        """
        updates = [update for update in self._updates() if newest is None or update <= newest]
        kept: set[str] = set()
        for update in updates[max(len(updates) - keep, 0) :]:
            kept |= {self._record_path(update).name, *_files(self._record(update), self._path(update, {}).name)}
        # A record goes before its files, so that none is ever without.
        for path in sorted(self.folder.glob("*"), key=lambda path: path.suffix != ".json"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _updates(self) -> list[int]:
        """The updates of complete checkpoints, in order."""
        return sorted(int(p.stem) for p in self.folder.glob("*.json") if p.stem.isdigit())

    def _record_path(self, update: int) -> Path:
        return self.folder / f"{update:07d}.json"

    def _record(self, update: int) -> dict[str, Any]:
        """The record of a checkpoint, or nothing where it is damaged."""
        try:
            record = json.loads(self._record_path(update).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        sound = isinstance(record, dict) and isinstance(record.get("parts", {}), dict)
        return record if sound else {}

    def _path(self, update: int, record: Mapping[str, Any]) -> Path:
        """What names a checkpoint: its file, or its record where it has parts."""
        path = self._record_path(update)
        return path if "parts" in record else path.with_suffix(".pt")

    def _read(self, path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Verify and open a checkpoint; nothing in it is executed."""
        files = list(_files(record, path.name).items())
        with _together(f"the checkpoint {path} cannot be read"):
            for name, expected in files[rank() :: world_size()]:
                _verify(self.folder / name, expected)
        with _together(f"the checkpoint {path} cannot be read"):
            opened = [
                torch.load(self.folder / name, map_location="cpu", weights_only=True, mmap=True) for name, _ in files
            ]
            if "parts" not in record:
                return opened[0]
            return sharding.join(opened[0]["common"], [part["pieces"] for part in opened])


@contextlib.contextmanager
def _together(failed: str) -> Iterator[None]:
    """A block that all processes get through, or none: an error in one becomes a `CheckpointError` in all."""
    fault = None
    try:
        yield
    except CheckpointError as error:
        fault = error
    except Exception as error:  # torch.save and torch.load have no common error class
        reason = one_line(error)
        if isinstance(error, OSError) and error.filename is not None and str(error.filename) in failed:
            reason = f"[Errno {error.errno}] {error.strerror}"
        fault = CheckpointError(f"{failed} ({reason})")
        fault.__cause__ = error
    for found in gather(fault):
        if found is not None:
            raise found


def _write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a file; its size and hash."""
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch says what went wrong inside, not that the disk is full
            if shutil.disk_usage(temporary.parent).free > 2**20:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        return {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}


def _files(record: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, Any]]:
    """Size and hash of the files of a checkpoint: its parts, or one file of this name."""
    return record.get("parts", {name: record})


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"the checkpoint {path} is damaged: it has {size} bytes instead of {expected['bytes']}")
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"the checkpoint {path} is damaged: its hash is not the one recorded")
