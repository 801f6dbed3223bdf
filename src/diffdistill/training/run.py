"""A run directory: resolved config, metrics, checkpoints, pictures, and the stages of runs that have several."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffdistill.distributed import barrier, from_main, rank
from diffdistill.errors import one_line
from diffdistill.files.atomic import locked, naming, write_text
from diffdistill.files.contents import CONTENTS, Content, content_of
from diffdistill.files.hashes import sha256
from diffdistill.training.checkpoints import Checkpoint, Checkpoints
from diffdistill.training.config import HARMLESS
from diffdistill.training.inputs import identity, setting_of

logger = logging.getLogger(__name__)
GROWS = "trainer.updates"
"""The setting that may be larger in a continuation: what a run did so far is what the longer run would have done."""

DECIDED = "decided.json"

CONSENT = ("fetch", "plugins")
"""Settings that permit to fetch files and to import modules; they change nothing that is computed."""


class Run:
    """A folder that belongs to one configuration. Opening it again with the same configuration continues the run.

    A configuration is the same if its settings are, and the files that they name hold the same, wherever these lie.
    With more `trainer.updates` than before the run is extended, also one that was finished.

    Files: `config.yaml`, `inputs.json` (what the files held that the settings name), `accepted.json` (configurations
    that it had before changes were accepted), `decided.json` (what was decided when it began, such as its precision),
    `metrics.jsonl`, `checkpoints/` (see `checkpoints`), `samples/*.png`, `curves.png`, `stages/NAME/` (runs of their
    own), and `finished.json` once `finish` was called.
    All but metrics.jsonl are written whole or not at all; all but parts of checkpoints by process 0.

    Args:
        path: the folder; it is made if it is not there.
        config: nested dicts of plain values.
        inputs: the files that a setting, named with its groups ("data.root"), stands for; see `inputs.inputs_of`.
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
        inputs: Mapping[str, Sequence[Path]] | None = None,
        harmless: Collection[str] = HARMLESS,
        accept_changes: bool = False,
    ) -> None:
        self.path = Path(path)
        self.inputs, self._decisions = dict(inputs or {}), self.path / DECIDED
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=_plain))
        self.harmless = frozenset({*harmless, *CONSENT})
        self.accept_changes = bool(self.config.pop("accept_changes", False)) or accept_changes
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: a run needs a folder")
        started = (self.path / "config.yaml").exists() and _content(self.path) is not None
        if not started and self.path.exists() and (other := _content(self.path)):
            raise ValueError(f"{self.path} holds no run but other files ({other}): choose an empty or new folder")
        before = self._read_contents() if started else {}
        self.contents: dict[str, Content] = from_main(self._contents(before) if rank() == 0 else {})
        stored = _read_yaml(self.path / "config.yaml") if started else None
        if stored is not None:
            self._check_same(stored, before)
        barrier()
        if rank() == 0:
            self._write_identity(stored, before)
        barrier()
        self._checkpoints = Checkpoints(self.path / "checkpoints", self._digests())

    def _write_identity(self, stored: Any, before: Mapping[str, Content]) -> None:
        """Write what this run is; what it was stays accepted, and a run that is extended is not finished any more."""
        self.path.mkdir(parents=True, exist_ok=True)
        if stored is None:
            self._decisions.unlink(missing_ok=True)
        else:
            digest, known = self._digest(stored, before), self._digests()
            if digest not in known:
                write_text(self.path / "accepted.json", json.dumps([*known[1:], digest]) + "\n")
            if _grown(stored, self.config):
                (self.path / "finished.json").unlink(missing_ok=True)
        _write_yaml(self.path / "config.yaml", self.config)
        if self.contents:
            record = {name: asdict(content) for name, content in self.contents.items()}
            write_text(self.path / "inputs.json", json.dumps(record, indent=1) + "\n")

    def _check_same(self, stored: Any, before: Mapping[str, Content]) -> None:
        """Refuse to continue another run. A stage that is finished stays as it is when later ones may change."""
        shared = before.keys() & self.contents.keys()
        then, now = (
            identity(config, {name: contents[name] for name in shared})
            for config, contents in ((stored, before), (self.config, self.contents))
        )
        found = [d for d in differences(then, now) if d[0].rpartition(".")[2] not in self.harmless]
        if self._extends(stored):
            found = [d for d in found if d[0] != GROWS]
            if not found and self._marked_finished() and self._checkpoints_kept() is None:
                raise ValueError(
                    f"{self.path} holds a run that is finished, whose last checkpoint is gone: start a new one from "
                    "its weights (init=PATH)"
                )
            decay = (self.config["trainer"] or {}).get("decay", "constant")
            if not found and decay != "constant":
                logger.warning(
                    "the run is extended: with decay=%s its learning rate rises to that of a longer run", decay
                )
        if not found:
            return
        finished = "stage" not in self.config and self._marked_finished()
        if not self.accept_changes or finished:
            shown = ", ".join(self._difference(*difference, shared) for difference in found[:5])
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            way = (
                "it is finished, so choose another folder"
                if finished
                else ("choose another folder, or accept_changes=true")
            )
            raise ValueError(f"{self.path} holds another run: {shown}{more}; {way}")

    def _difference(self, name: str, old: Any, new: Any, contents: Collection[str]) -> str:
        if (setting := name.removeprefix(f"{CONTENTS}.")) in contents:
            return f"what {setting}={setting_of(self.config, setting) or '...'} holds has changed"
        return f"{name} was {old!r} and is now {new!r}"

    def _extends(self, stored: Any) -> bool:
        """Whether this run has more updates than before, and is not one of several stages, which follow each other."""
        staged = "stage" in self.config or (self.path / "stages").exists()
        return not staged and _grown(stored, self.config)

    def _checkpoints_kept(self) -> Path | None:
        return Checkpoints(self.path / "checkpoints").newest()

    def _contents(self, before: Mapping[str, Content]) -> dict[str, Content]:
        """What the inputs hold; those that cannot be read any more are left out, and known by their paths."""
        contents = {}
        for name, files in self.inputs.items():
            with contextlib.suppress(OSError):
                contents[name] = content_of(files, before.get(name))
        return contents

    def _read_contents(self) -> dict[str, Content]:
        try:
            record = json.loads((self.path / "inputs.json").read_text(encoding="utf-8"))
            return {name: Content(**content) for name, content in record.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _digest(self, config: Any, contents: Mapping[str, Content]) -> str:
        """What two configurations share that differ in harmless settings only."""
        decides = _without(identity(config, contents), self.harmless)
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """A short hash of what decides the results: settings that are not harmless, and contents of inputs."""
        return self._digest(self.config, self.contents)

    def _digests(self) -> list[str]:
        """Of the configurations whose checkpoints are this run's."""
        try:
            accepted = json.loads((self.path / "accepted.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            accepted = []
        return [self.digest, *accepted]

    def stage(self, name: str) -> Run:
        """The run of one stage, in `stages/NAME`, with its own metrics, checkpoints and `finished` mark."""
        if not name or name != Path(name).name:
            raise ValueError(f"a stage is named like a file, without folders, not {name!r}")
        stage = Run(
            self.path / "stages" / name,
            {**self.config, "stage": name},
            inputs=self.inputs,
            harmless=self.harmless,
            accept_changes=self.accept_changes,
        )
        stage._decisions = self._decisions
        return stage

    def decided(self, name: str, decide: Callable[[], str]) -> str:
        """What the run began with: `decide()` at first, and the same in its continuation and in all its stages.

        All processes call it. Each calls `decide`, or none does; what process 0 decides holds.
        """
        known = from_main(self._read_decisions())
        if name not in known:
            known[name] = from_main(decide())
            if rank() == 0:
                write_text(self._decisions, json.dumps(known) + "\n")
        return known[name]

    def _read_decisions(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._decisions.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._decisions} cannot be read ({one_line(error)}): remove it") from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other programs from writing to the folder. All processes call it.

        Raises:
            ValueError: another program holds it.
        """
        with contextlib.ExitStack() as stack:
            fault = None
            if rank() == 0:
                try:
                    stack.enter_context(locked(self.path))
                except ValueError as error:
                    fault = error
            if fault := from_main(fault):
                raise fault
            yield

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, and the files it named are there, unchanged.

        Process 0 looks and tells the others, which could find its mark of this very moment and go another way.
        """
        return bool(from_main(int(rank() == 0 and self._marked_finished())))

    def _marked_finished(self) -> bool:
        try:
            record = json.loads((self.path / "finished.json").read_text(encoding="utf-8"))
            return all(sha256(self.path / name) == digest for name, digest in record["files"].items())
        except (OSError, ValueError, KeyError):
            return False

    def finish(self, files: Iterable[str] = (), *, keep: int = 0) -> None:
        """Mark the run as done: `files`, named relative to the folder, are its results.

        Of the checkpoints the last `keep` stay; with one of them the run can be extended.
        """
        if rank() == 0:
            digests = {name: sha256(self.path / name) for name in files}
            write_text(self.path / "finished.json", json.dumps({"files": digests}, indent=2) + "\n")
            self._checkpoints.prune(keep)
        barrier()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if rank() == 0:
            path = self.path / "metrics.jsonl"
            with naming(path), open(path, "a", encoding="utf-8") as file:
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

        All processes call it. Of tensors that are split over them, each writes its part; of all else, process 0.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        return self._checkpoints.save(update, state, keep=keep)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint whose size and hash are right, or None if none was written. All processes call it.

        A damaged one is passed over with a warning; the one before it is taken.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or one was written by another run.
        """
        return self._checkpoints.load()

    def newest_checkpoint(self) -> Path | None:
        """The path of the newest complete checkpoint, or None."""
        return self._checkpoints.newest()


def _grown(old: Any, new: Any) -> bool:
    """Whether a run of `new` has more updates than one of `old`."""
    before, after = setting_of(old, GROWS), setting_of(new, GROWS)
    return isinstance(before, int) and isinstance(after, int) and after > before


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


def _content(path: Path) -> str | None:
    """The first entry that is neither what a command leaves that failed before it computed anything, nor Hydra's."""
    for entry in sorted(path.iterdir()):
        passing = entry.name in ("config.yaml", "inputs.json", DECIDED) or entry.suffix == ".log"
        if not passing and not entry.name.startswith(".") and (not entry.is_dir() or _content(entry) is not None):
            return entry.name
    return None


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml and omegaconf have no common error class
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
