"""The settings of the scripts: where their files lie, and their values as plain dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and numbers."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def defaults_of(config_name: str) -> dict[str, Any]:
    """The settings of a script as its file states them."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The config of another script, as its command line would make it."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, overrides)
