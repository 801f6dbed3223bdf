"""The files that the settings of a command stand for: what they hold decides what the command makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffdistill.data.pictures import is_picture
from diffdistill.files.contents import CONTENTS, Content, files_within
from diffdistill.files.records import shipped_files
from diffdistill.files.remote import local_path
from diffdistill.models.loading import find_model
from diffdistill.training.checkpoints import Checkpoints


def model_files(name: str) -> list[Path]:
    """The files of a model by its name or path: one file, the newest checkpoint of a run, or a diffusers folder."""
    try:
        key, path = find_model(name)
    except ValueError:
        return []  # what reads it says why
    if key == "config.yaml":
        newest = Checkpoints(path.parent / "checkpoints").newest()
        return [] if newest is None else [newest]
    return files_within(path.parent) if key in ("model_index.json", "config.json") else [path]


def _record_files(folder: str) -> Callable[[str], list[Path]]:
    return lambda name: files_within(shipped_files(folder).get(name) or local_path(name))


def _image_files(path: str, *, beside: tuple[str, ...] = ()) -> list[Path]:
    """The pictures of a folder, and what belongs to them by these suffixes; all files where there are no pictures."""
    files = files_within(path)
    if not Path(path).is_dir():
        return files
    return [file for file in files if is_picture(file.name) or file.suffix in beside] or files


FILES: dict[str, Callable[[str], list[Path]]] = {
    **dict.fromkeys(("model", "teacher", "init", "pipeline"), model_files),
    **dict.fromkeys(("predictor", "learned"), _record_files("predictors")),
    "statistics": _record_files("statistics"),
    **dict.fromkeys(("lora", "reference"), lambda name: files_within(local_path(name))),
    "root": _image_files,
    "images": partial(_image_files, beside=(".txt", ".tar")),
    **dict.fromkeys(("path", "captions", "mask"), files_within),
}
"""The files of a setting with such a name, wherever it stands."""


def inputs_of(settings: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files behind the settings that name some, as `Run` takes them: `{"data.root": [...], "teacher": [...]}`.

    Names of what comes with the package stand for its files too. Settings that name nothing that is there are left out.
    """
    found: dict[str, list[Path]] = {}
    for name, value in _named(settings, ""):
        values = value if isinstance(value, list) else [value]
        files = [file for each in values for file in FILES[name.rpartition(".")[2]](each)]
        if files and all(file.is_file() for file in files):
            found[name] = files
    return found


def _named(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The settings of a name in `FILES` that are a text, or a list of such."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{key}.")
        elif key in FILES and (
            isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
        ):
            yield f"{prefix}{key}", value


def identity(config: Any, contents: Mapping[str, Content]) -> Any:
    """A nested config in which the digest of what files hold stands in place of their paths."""
    config = json.loads(json.dumps(config))
    for name in contents:
        group, _, last = name.rpartition(".")
        place = setting_of(config, group) if group else config
        if isinstance(place, dict):
            place.pop(last, None)
    return {**config, CONTENTS: {name: content.digest for name, content in contents.items()}} if contents else config


def setting_of(config: Any, name: str) -> Any:
    """The value of a dotted name in a nested config; None where there is none."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
