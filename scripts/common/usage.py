"""What `--help` shows: the docstring of a script, its settings with their comments, and the choices for groups."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

PRESETS = {
    "train_teacher": ("teacher",),
    "train_autoencoder": ("autoencoder",),
    "distill_guidance": ("stage1",),
    "distill_steps": ("stage2", "/encoder", "trajectory", "consistency", "flow_map"),
    "train_amed": ("nfe",),
}
"""How the names of a script's presets end; all of zhou2024 belong to train_amed."""
FOOT = """name=value replaces a setting, group.name=value one of a group; +group.name=value adds one.
--cfg job shows all settings that a command line gives. HYDRA_FULL_ERROR=1 shows where an error comes from."""


def usage(configs: Path, script: str, doc: str) -> str:
    """The help of a script whose settings are `configs/SCRIPT.yaml`."""
    text = (configs / f"{script}.yaml").read_text(encoding="utf-8")
    parts = [doc.strip(), f"Settings:\n\n{settings_of(text)}"]
    groups = choices(configs, script, text)
    if groups:
        parts.append("Groups of settings:\n\n" + "\n".join(groups))
    return "\n\n".join([*parts, FOOT])


def settings_of(text: str) -> str:
    """The lines of a config that are settings: not its heading, its defaults and what Hydra needs."""
    lines, shown = [], False
    for line in text.splitlines():
        if line and not line[0].isspace():
            shown = not line.startswith(("#", "defaults:", "hydra:"))
        if shown and line.strip():
            lines.append(f"  {line}")
    return "\n".join(lines)


def choices(configs: Path, script: str, text: str) -> list[str]:
    """For each group of a config what there is to choose from, and what is chosen."""
    lines = []
    for entry in OmegaConf.to_container(OmegaConf.create(text))["defaults"]:  # type: ignore[index, call-overload]
        ((group, default),) = entry.items() if isinstance(entry, dict) else (("_self_", None),)
        if str(group).startswith(("_self_", "override")):
            continue
        name, _, _ = str(group).partition("@")
        found = ", ".join(n for n in names_of(configs / name) if name != "experiment" or belongs(n, script))
        chosen = {None: "none", "???": "must be given"}.get(default, default)
        lines.append(textwrap.fill(f"  {group}={chosen}: {found}", 110, subsequent_indent="    "))
    return lines


def names_of(folder: Path) -> list[str]:
    """The configs of a group."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def belongs(preset: str, script: str) -> bool:
    """Whether a preset is one for this script."""
    if script not in PRESETS or preset == "none" or preset.endswith(PRESETS[script]):
        return True
    return script == "train_amed" and preset.startswith("zhou2024/")


def check_preset(configs: Path, script: str, arguments: Sequence[str]) -> None:
    """Refuse the preset of another script, whose settings would mix with those of this one.

    Raises:
        ValueError: names the preset, and those of this script.
    """
    known = names_of(configs / "experiment")
    for argument in arguments:
        name, _, preset = argument.partition("=")
        if name == "experiment" and preset in known and not belongs(preset, script):
            own = ", ".join(n for n in known if belongs(n, script))
            raise ValueError(f"experiment={preset} is a preset of another script: choose one of {own}")
