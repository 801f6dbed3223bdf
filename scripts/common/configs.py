"""The settings of the scripts: where their files lie, how they are composed, and their values as plain dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and numbers."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def file_of(config_name: str) -> dict[str, Any]:
    """The file of a script's settings as it stands."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def defaults_of(config_name: str) -> dict[str, Any]:
    """The settings of a script as its file states them."""
    return {key: value for key, value in file_of(config_name).items() if key not in ("defaults", "hydra")}


def groups_of(config_name: str) -> list[tuple[str, str, str | None]]:
    """The groups of a script: the folder of their presets, the setting they become ("" for the same), the default."""
    entries = [next(iter(entry.items())) for entry in file_of(config_name)["defaults"] if isinstance(entry, dict)]
    return [(*name.partition("@")[::2], default) for name, default in entries if not name.startswith("override")]


def preset_of(group: str, choice: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The settings of a preset as its file states them, without those that it builds on; {} where there is no such."""
    path = next((path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file()), None)
    found = {} if path is None else OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key != "defaults"}


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The config of another script, as its command line would make it."""
    if GlobalHydra.instance().is_initialized():
        config = hydra.compose(config_name, overrides)
    else:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose(config_name, overrides)
    let_given_win(config, given_by(overrides))
    return config


def changed(config: DictConfig, changes: DictConfig) -> DictConfig:
    """A config with nested changes, as a command line would make them."""
    with open_dict(config):
        config = OmegaConf.merge(config, changes)  # type: ignore[assignment]
    let_given_win(config, plain(changes))
    return config


def names_in(overrides: Iterable[str]) -> set[str]:
    """The settings that a command line gives, those of groups by the name of the group."""
    return {override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides}


def given_by(overrides: Iterable[str]) -> dict[str, Any]:
    """What a command line gives of the trainer, for all stages and for single ones, as nested dicts."""
    given = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name, preset = override.key_or_group, isinstance(override.value(), str) and "." not in override.key_or_group
        if name.partition(".")[0] in ("trainer", "stages") and not override.is_sweep_override() and not preset:
            OmegaConf.update(given, name, override.value(), force_add=True)
    return plain(given)


def let_given_win(config: DictConfig, given: Mapping[str, Any]) -> None:
    """Take out of `stages` what a preset says there of the trainer, where the user gave a value for all stages."""
    stages, trainer = config.get("stages"), given.get("trainer")
    if not isinstance(stages, DictConfig) or not isinstance(trainer, Mapping):
        return
    kept = {str(number): values for number, values in (given.get("stages") or {}).items()}
    for number, values in stages.items():
        for name in trainer:
            if isinstance(values, DictConfig) and name in values and name not in kept.get(str(number), {}):
                with open_dict(values):
                    del values[name]
