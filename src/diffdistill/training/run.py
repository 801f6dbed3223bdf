"""A run directory: resolved config, metrics, checkpoints, pictures, and the stages of runs that have several."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.atomic import replacing, write_text
from diffdistill.training.config import HARMLESS
from diffdistill.training.distributed import barrier, from_main, rank

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `update` updates."""

    update: int
    state: dict[str, Any]
    path: Path


class Run:
    """A folder that belongs to one configuration. Opening it again with the same configuration continues the run.

    Files: `config.yaml`, `accepted.json` (configurations that it had before changes were accepted), `metrics.jsonl`,
    `checkpoints/0001000.pt` each with `0001000.json` (size, SHA-256 and configuration), `samples/*.png`, `curves.png`,
    `stages/NAME/` (runs of their own), and `finished.json` once `finish` was called.
    All but metrics.jsonl are written whole or not at all, by process 0.

    Args:
        path: the folder; it is made if it is not there.
        config: nested dicts of plain values.
        harmless: names of settings, at any depth, that may differ from the ones the run was started with.
        accept_changes: continue a run whose configuration differs in other settings too. The entry `accept_changes`
            of `config` says the same, and is not part of the configuration.

    Raises:
        ValueError: the folder holds another run, or files that are not a run's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        harmless: Collection[str] = HARMLESS,
        accept_changes: bool = False,
    ) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=_plain))
        self.harmless = frozenset(harmless)
        self.accept_changes = bool(self.config.pop("accept_changes", False)) or accept_changes
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: a run needs a folder")
        stored = None
        if (self.path / "config.yaml").exists():
            stored = _read_yaml(self.path / "config.yaml")
            self._check_same(stored)
        elif self.path.exists() and (other := _foreign(self.path)):
            raise ValueError(f"{self.path} holds no run but other files ({other}): choose an empty or new folder")
        barrier()
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            if stored is not None and (before := self._digest(stored)) not in self._digests():
                write_text(self.path / "accepted.json", json.dumps([*self._digests()[1:], before]) + "\n")
            _write_yaml(self.path / "config.yaml", self.config)
        barrier()

    def _check_same(self, stored: Any) -> None:
        found = [d for d in differences(stored, self.config) if d[0].rpartition(".")[2] not in self.harmless]
        if found and not self.accept_changes:
            shown = ", ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in found[:5])
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(
                f"{self.path} holds another run: {shown}{more}; choose another folder, or accept_changes=true"
            )

    def _digest(self, config: Any) -> str:
        """What two configurations share that differ in harmless settings only."""
        return hashlib.sha256(json.dumps(_without(config, self.harmless), sort_keys=True).encode()).hexdigest()[:16]

    def _digests(self) -> list[str]:
        """Of the configurations whose checkpoints are this run's."""
        try:
            accepted = json.loads((self.path / "accepted.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            accepted = []
        return [self._digest(self.config), *accepted]

    def stage(self, name: str) -> Run:
        """The run of one stage, in `stages/NAME`, with its own metrics, checkpoints and `finished` mark."""
        if not name or name != Path(name).name:
            raise ValueError(f"a stage is named like a file, without folders, not {name!r}")
        config = {**self.config, "stage": name}
        return Run(self.path / "stages" / name, config, harmless=self.harmless, accept_changes=self.accept_changes)

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, and the files it named are there, unchanged.

        Process 0 looks and tells the others, which could find its mark of this very moment and go another way.
        """
        return bool(from_main(int(rank() == 0 and self._marked_finished())))

    def _marked_finished(self) -> bool:
        try:
            record = json.loads((self.path / "finished.json").read_text(encoding="utf-8"))
            return all(_sha256(self.path / name) == digest for name, digest in record["files"].items())
        except (OSError, ValueError, KeyError):
            return False

    def finish(self, files: Iterable[str] = (), *, keep_checkpoints: bool = False) -> None:
        """Mark the run as done: `files`, named relative to the folder, are its results. Checkpoints are removed."""
        if rank() == 0:
            digests = {name: _sha256(self.path / name) for name in files}
            write_text(self.path / "finished.json", json.dumps({"files": digests}, indent=2) + "\n")
            if not keep_checkpoints:
                self._prune(keep=0)
        barrier()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if rank() == 0:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a crash cut off is left out."""
        return read_metrics(self.path / "metrics.jsonl")

    def rewind(self, update: int) -> None:
        """Drop the metrics of later updates than this one: they will be computed again."""
        path = self.path / "metrics.jsonl"
        if rank() == 0 and path.exists():
            kept = [r for r in self.metrics() if r.get("update", 0) <= update]
            write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def save_checkpoint(self, update: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
        """Write a checkpoint (tensors, numbers, strings, lists, dicts), then remove all but the last `keep`.

        It counts only once its `.json` with size and hash is there, which is written last.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        path = self._path(update)
        if rank() != 0:
            return path
        try:
            path.with_suffix(".json").unlink(missing_ok=True)
            with replacing(path) as temporary:
                torch.save(dict(state), temporary)
                manifest = {"update": update, "bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
                manifest["config"] = self._digest(self.config)
            write_text(path.with_suffix(".json"), json.dumps(manifest) + "\n")
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            last = self.newest_checkpoint()
            left = f"the last good one is {last}" if last else "there is none before it"
            raise CheckpointError(f"could not write the checkpoint {path} ({_line(error)}): {left}") from error
        self._prune(keep, newest=update)
        return path

    def load_checkpoint(self, map_location: torch.device | str = "cpu") -> Checkpoint | None:
        """The newest checkpoint whose size and hash are right, or None if none was written.

        A damaged one is passed over with a warning; the one before it is taken.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or one was written by another run.
        """
        found = self._newest_good(map_location) if rank() == 0 else None
        update = from_main(-1 if found is None else found.update)
        if rank() != 0 and update >= 0:
            found = Checkpoint(update, read_checkpoint(self._path(update), map_location), self._path(update))
        return found

    def _newest_good(self, map_location: torch.device | str) -> Checkpoint | None:
        updates = self._updates()
        for update in reversed(updates):
            path = self._path(update)
            if _manifest(path).get("config", self._digest(self.config)) not in self._digests():
                raise CheckpointError(
                    f"the checkpoint {path} was written by a run of other settings: remove what is not of this run"
                )
            try:
                return Checkpoint(update, read_checkpoint(path, map_location), path)
            except CheckpointError as error:
                logger.warning("%s; going back to the checkpoint before it", error)
        if updates:
            raise CheckpointError(f"no checkpoint in {self.path / 'checkpoints'} can be read: remove it to start again")
        return None

    def newest_checkpoint(self) -> Path | None:
        """The path of the newest complete checkpoint, or None."""
        updates = self._updates()
        return self._path(updates[-1]) if updates else None

    def _path(self, update: int) -> Path:
        return self.path / "checkpoints" / f"{update:07d}.pt"

    def _updates(self) -> list[int]:
        """The updates of complete checkpoints, in order."""
        return sorted(int(p.stem) for p in (self.path / "checkpoints").glob("*.json") if p.stem.isdigit())

    def _prune(self, keep: int, newest: int = -1) -> None:
        """Remove all but the last checkpoints up to `newest` (later ones are damaged), and what crashes left behind."""
        updates = [update for update in self._updates() if update <= newest]
        kept = {f"{u:07d}" for u in updates[max(len(updates) - keep, 0) :]}
        folder = self.path / "checkpoints"
        if not folder.exists():
            return
        for path in sorted(folder.iterdir()):  # a .json goes before its .pt, so that no .json is ever without
            if path.name.split(".")[0] not in kept:
                path.unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read and verify one checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: it is missing, truncated, altered, or no checkpoint.
    """
    try:
        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, expected = path.stat().st_size, manifest["bytes"]
        if size != expected:
            raise CheckpointError(f"the checkpoint {path} is damaged: it has {size} bytes instead of {expected}")
        if _sha256(path) != manifest["sha256"]:
            raise CheckpointError(f"the checkpoint {path} is damaged: its hash is not the one recorded")
        return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load has no common error class for damaged files
        raise CheckpointError(f"the checkpoint {path} cannot be read ({_line(error)})") from error


def _manifest(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, or nothing where it is damaged."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _without(config: Any, names: Collection[str]) -> Any:
    """A nested config without the entries of these names."""
    if isinstance(config, dict):
        return {key: _without(value, names) for key, value in config.items() if key not in names}
    return config


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl file; lines that are no record (cut off by a crash) are left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two nested configs differ: `(dotted name, old value, new value)`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))]
    return [] if old == new else [(name, old, new)]


def _plain(value: Any) -> Any:
    """What json does not know, as plain values."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"a config holds plain values, not {type(value).__name__} ({value!r})")


def _foreign(path: Path) -> str | None:
    """The first entry that neither a run nor Hydra puts there."""
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith(".") and p.suffix != ".log")
    return names[0] if names else None


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml and omegaconf have no common error class
        raise ValueError(f"{path} cannot be read ({_line(error)})") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
