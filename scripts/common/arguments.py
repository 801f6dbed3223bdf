"""What stands on a command line: flags, the folders of presets that they name, and settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from common.configs import CONFIGS

WITH_VALUE = {"--config-dir": "--config-dir", "-cd": "--config-dir", "--cfg": "--cfg", "-c": "--cfg"}
WITH_VALUE |= {"--package": "--package", "-p": "--package", "--info": "--info", "-i": "--info"}


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags with their values, and the settings: in any order on the command line, but not so for Hydra."""
    flags, settings, following = [], [], False
    for argument in arguments:
        if following or argument.startswith("-"):
            flags.append(argument)
            following = not following and argument in WITH_VALUE
        else:
            settings.append(argument)
    return flags, settings


def preset_folders(arguments: Sequence[str]) -> list[Path]:
    """Where presets lie: the folder of `--config-dir`, if it is given, and our own.

    Raises:
        ValueError: there is no such folder.
    """
    flags, _ = parted(arguments)
    own = []
    for flag, following in pairwise([*flags, ""]):
        name, equals, value = flag.partition("=")
        if WITH_VALUE.get(name) == "--config-dir":
            own.append(Path(value if equals else following).expanduser())
    for folder in own:
        if not folder.is_dir():
            raise ValueError(f"--config-dir: there is no folder {os.fspath(folder)!r}")
    return [*own, CONFIGS]


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The same command line for Hydra: flags first, and settings that a preset does not state are added.

    So `data.flip=true` works where the data set has such an option; what nothing reads is refused afterwards, with the
    nearest valid name, see `checks`.
    """
    flags, settings = parted(arguments)
    folders = preset_folders(arguments)
    return [*flags, *(_added(setting, folders) for setting in settings)]


def _added(setting: str, folders: Sequence[Path]) -> str:
    name, equals, _ = setting.partition("=")
    bare = equals and not name.startswith(("+", "~", "hydra.", "hydra/"))
    if not bare or "@" in name or any((folder / name).is_dir() for folder in folders):
        return setting
    return f"++{setting}"


def as_given(setting: str) -> str:
    """A setting as the user gave it, before `for_hydra`."""
    return setting.removeprefix("++")
