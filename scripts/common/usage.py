"""What `--help` shows: the docstring of a script, its settings with their comments, and the choices for groups."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from common.configs import CONFIGS, groups_of, preset_of
from common.groups import WHOLE, options_of

PRESETS = {
    "train_teacher": ("teacher",),
    "train_autoencoder": ("autoencoder",),
    "distill_guidance": ("stage1",),
    "distill_steps": ("stage2", "/encoder", "trajectory", "consistency", "flow_map"),
    "train_amed": ("nfe",),
}
"""How the names of a script's presets end; all of zhou2024 belong to train_amed."""
WIDTH = 110
FOOT = """name=value gives a setting, group.name=value one of a group; what a choice takes is listed above.
--config-dir DIR adds presets of yours: DIR/solver/mine.yaml is solver=mine, and so on for every group.
--cfg job shows all settings that a command line gives. HYDRA_FULL_ERROR=1 shows where an error comes from."""


def usage(folders: Sequence[Path], script: str, doc: str) -> str:
    """The help of a script whose settings are `configs/SCRIPT.yaml`, and whose presets lie in `folders`."""
    text = (CONFIGS / f"{script}.yaml").read_text(encoding="utf-8")
    parts = [doc.strip(), f"Settings:\n\n{settings_of(text)}"]
    groups = choices(folders, script)
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


def choices(folders: Sequence[Path], script: str) -> list[str]:
    """For each group of a config what there is to choose from and what is chosen, with the options of each choice."""
    lines = []
    for name, target, default in groups_of(script):
        chosen = {None: "none", "???": "must be given"}.get(default, default)
        found = [n for n in names_of(name, folders) if name != "experiment" or belongs(n, script)]
        lines.append(_wrapped(f"  {name}{f'@{target}' * bool(target)}={chosen}: {', '.join(found)}"))
        if name in WHOLE:
            lines.append(_wrapped(f"    takes {', '.join(options_of(name) or ())}"))
            continue
        for choice in found:
            options = options_of(name, preset_of(name, choice, folders).get("name"))
            if options is not None:
                shown = [option for option in options if (name, option) != ("schedule", "num_steps")]
                lines.append(_wrapped(f"    {choice} takes {', '.join(shown) or 'nothing'}"))
    return lines


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def names_of(group: str, folders: Sequence[Path]) -> list[str]:
    """The configs of a group."""
    found = {
        str(path.relative_to(folder / group).with_suffix(""))
        for folder in folders
        for path in (folder / group).rglob("*.yaml")
    }
    return sorted(found)


def belongs(preset: str, script: str) -> bool:
    """Whether a preset is one for this script; those of the user are for all."""
    known = preset in names_of("experiment", [CONFIGS])
    if script not in PRESETS or not known or preset == "none" or preset.endswith(PRESETS[script]):
        return True
    return script == "train_amed" and preset.startswith("zhou2024/")


def check_preset(folders: Sequence[Path], script: str, arguments: Sequence[str]) -> None:
    """Refuse the preset of another script, whose settings would mix with those of this one.

    Raises:
        ValueError: names the preset, and those of this script.
    """
    known = names_of("experiment", folders)
    for argument in arguments:
        name, _, preset = argument.partition("=")
        if name == "experiment" and preset in known and not belongs(preset, script):
            own = ", ".join(n for n in known if belongs(n, script))
            raise ValueError(f"experiment={preset} is a preset of another script: choose one of {own}")
