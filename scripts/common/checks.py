"""Settings that several scripts share, checked before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COUNTS = ("num_samples", "num_steps", "num_images", "num_trajectories", "tuning_samples", "batch_size", "shard_size")
COUNTS += ("splits", "repeats", "updates", "components", "rank")
SWITCHES = ("accept_changes", "channels_last", "compile", "cuda_graph", "dry_run", "again", "save_samples")
SWITCHES += ("keep_features", "beside", "per_class", "analytic_first_step")
NAMES = ("model", "teacher", "out", "dest", "features", "images", "mask", "pipeline")
OPTIONAL = ("w", "num_steps")
"""Settings that may be null whatever their default is, unless that is a range."""


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_range(value: Any) -> bool:
    return all(map(is_number, value)) and len(value) == 2 if isinstance(value, list) else is_number(value)


def is_count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_count, values))


def is_rate(value: Any) -> bool:
    return is_number(value) and value > 0


Rule = tuple[Callable[[Any], bool], str]
NUMBER: Rule = (is_number, "a finite number")
RULES: dict[str, Rule] = {
    **dict.fromkeys(COUNTS, (is_count, "an integer of at least 1")),
    **dict.fromkeys(SWITCHES, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(NAMES, (is_name, "a name or a path")),
    "seed": (is_integer, "an integer"),
    "evaluations": (are_counts, "a list of integers of at least 1"),
    "lr": (is_rate, "a positive number"),
    "w": NUMBER,
    "lora": (lambda value: is_name(value) or isinstance(value, dict), "null, a file or a mapping, such as {rank: 16}"),
    "lora_strength": NUMBER,
    "strength": NUMBER,
}
RANGE: Rule = (is_range, "a finite number, or the least and the greatest")


def rule_of(name: str, default: Any) -> Rule | None:
    """What a setting must be; one that no rule names must be a number if its default has a point.

    A group of settings is checked where it is used.
    """
    if isinstance(default, dict):
        return None
    if name == "w" and isinstance(default, list):
        return RANGE
    return RULES.get(name, NUMBER if isinstance(default, float) else None)


def check_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values of the wrong kind.

    Args:
        settings: of a script.
        defaults: of the same script; a setting whose default is null may be null.

    Raises:
        ValueError: names the first wrong value, and what it must be.
    """
    for name, default in defaults.items():
        if name not in settings:
            continue
        value, rule = settings[name], rule_of(name, default)
        may_be_null = default is None or (name in OPTIONAL and not isinstance(default, list))
        if rule is not None and not rule[0](value) and not (value is None and may_be_null):
            raise ValueError(f"{name} must be {rule[1]}, but is {value!r}")


def check_file(path: str | Path | None, suffix: str) -> None:
    """Make the folder of a file that is written in the end; refuse a folder in its place.

    Raises:
        ValueError: `path` is a folder.
        OSError: its folder cannot be made.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"out={path} is a folder: name the file to write, such as {Path(path) / f'result{suffix}'}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def several(value: Any) -> list[Any]:
    """A list, where one entry may stand alone."""
    return value if isinstance(value, list) else [] if value is None else [value]
