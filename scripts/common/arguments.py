"""What stands on a command line: flags, the folders of presets that they name, and settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from common.checks import ELSEWHERE
from common.configs import CONFIGS, groups_of

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


def for_hydra(arguments: Sequence[str], config_name: str) -> list[str]:
    """The same command line for Hydra: flags first, and settings that a preset does not state are added.

    So `data.flip=true` works where the data set has such an option; what nothing reads is refused afterwards, with the
    nearest valid name, see `checks`.

    Raises:
        ValueError: a group of settings of other commands.
    """
    flags, settings = parted(arguments)
    groups = [name for name, _, _ in groups_of(config_name)]

    def added(setting: str) -> str:
        name, equals, _ = setting.partition("=")
        if equals and name not in groups and (CONFIGS / name).is_dir():
            guess = f" (did you mean {ELSEWHERE[name]}?)" if name in ELSEWHERE else ""
            raise ValueError(f"unknown setting {name!r}{guess}: this command has no such group of settings")
        as_it_is = not equals or name.startswith(("+", "~", "hydra.", "hydra/")) or "@" in name or name in groups
        return setting if as_it_is else f"++{setting}"

    return [*flags, *map(added, settings)]


def as_given(setting: str) -> str:
    """A setting as the user gave it, before `for_hydra`."""
    return setting.removeprefix("++")
