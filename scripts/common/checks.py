"""Settings, checked before anything is read or written: names that nothing reads, and values of the wrong kind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from common.configs import CONFIGS, defaults_of, groups_of, preset_of
from common.groups import MODEL, WHOLE, kind_of, options_of
from diffdistill.settings import Count, Finite, Integer, Limit, Name, Positive, check_values, mismatch, nearest

COUNTS = ("num_samples", "num_steps", "num_images", "num_trajectories", "tuning_samples", "batch_size", "shard_size")
COUNTS += ("splits", "repeats", "updates", "components", "rank")
SWITCHES = ("accept_changes", "channels_last", "compile", "cuda_graph", "dry_run", "again", "save_samples")
SWITCHES += ("keep_features", "beside", "side_by_side", "per_class", "analytic_first_step", "fetch")
NAMES = ("model", "teacher", "out", "dest", "features", "images", "mask", "pipeline")
OPTIONAL = ("w", "num_steps", "preview", "stages")
"""Settings that may be null whatever their default is, unless that is a range."""
LISTED = ("solvers", "schedules", "bases")
"""Groups that list things by name, of which some may be taken out."""

Range = Annotated[
    list | float,
    Limit(
        "a finite number, or the least and the greatest",
        lambda value: (
            len(value) == 2 and not any(mismatch(v, Finite) for v in value)
            if isinstance(value, list)
            else not mismatch(value, Finite)
        ),
    ),
]
Counts = Annotated[
    list, Limit("a list of integers of at least 1", lambda value: all(not mismatch(v, Count) for v in [*value]))
]
HINTS: dict[str, Any] = {
    **dict.fromkeys(COUNTS, Count),
    **dict.fromkeys(SWITCHES, bool),
    **dict.fromkeys(NAMES, Name),
    "seed": Integer,
    "evaluations": Counts,
    "lr": Positive,
    "w": Finite,
    "lora": Annotated[
        Any, Limit("null, a file or a mapping, such as {rank: 16}", lambda v: isinstance(v, (dict, str)) and v != "")
    ],
    "lora_strength": Finite,
    "strength": Finite,
}
"""What settings must be, by their names."""
ELSEWHERE = {
    **dict.fromkeys(("guidance", "guidance_weight", "cfg", "cfg_scale"), "w"),
    "guidance_scale": "w, which is guidance_scale - 1",
    **dict.fromkeys(("steps", "num_inference_steps"), "num_steps"),
    **dict.fromkeys(("n", "count", "num_images"), "num_samples"),
    **dict.fromkeys(("sampler", "scheduler"), "solver"),
    **dict.fromkeys(("checkpoint", "ckpt", "name_or_path"), "model"),
    **dict.fromkeys(("output", "outdir", "output_dir"), "out"),
    **dict.fromkeys(("class", "classes", "label", "class_labels"), "labels"),
    **dict.fromkeys(("lr", "learning_rate"), "learning_rate"),
    **dict.fromkeys(("iterations", "max_steps", "train_steps"), "updates"),
}
"""What settings are called elsewhere."""


def check_settings(settings: Mapping[str, Any], config_name: str, *, given: Collection[str] = ()) -> None:
    """Refuse what the command of `configs/<config_name>.yaml` does not read, and values of the wrong kind.

    Args:
        settings: all settings.
        config_name: of the command.
        given: names of settings that the user typed, for those that a preset may state although nothing reads them.

    Raises:
        ValueError: names the first wrong setting, and the nearest valid one or what its value must be.
    """
    defaults = defaults_of(config_name)
    groups = [target or name for name, target, _ in groups_of(config_name)]
    chosen = [group for group in groups if isinstance(settings.get(group), str)]
    whole = [name for group in chosen for name in _of_choice(group, settings, given)]
    _check_known(
        settings, [*dict.fromkeys([*defaults, *groups, *sorted(whole)])], (), config_name.replace("_", "-"), settings
    )
    for path, group in mappings(settings):
        stated = _at(defaults, path)
        valid = _valid(path, group, stated)
        if valid is not None:
            _check_known(group, valid, path, ".".join(path), settings)
    _check_complete(settings, defaults, ())
    for name, default in defaults.items():
        hint = _hint(name, default)
        if hint is not None and not (settings[name] is None and _may_be_null(name, default)):
            check_values({name: settings[name]}, {name: hint})


def mappings(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping within settings, with its path; those in lists too."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        if isinstance(child, Mapping):
            yield (*path, str(name)), child
        yield from mappings(child, (*path, str(name)))


def refuse_unread(config_name: str, settings: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    """Refuse settings that a command reads at other times only, unless they are as in its file.

    Args:
        config_name: of the command.
        settings: what is given.
        names: the settings that are not read now.
        why: says when they are not read, such as "on data".

    Raises:
        ValueError: names the first that differs from its default.
    """
    defaults = defaults_of(config_name)
    for name in names:
        if settings.get(name) != defaults.get(name):
            raise ValueError(f"{name} has no effect {why}: leave it out")


def _of_choice(group: str, settings: Mapping[str, Any], given: Collection[str]) -> set[str]:
    """The settings of a group that is chosen by its name alone: its presets state settings of the whole command.

    Those of other choices are known too, since presets state them, but the user's are refused.
    """
    presets = {path.stem: set(preset_of(group, path.stem, [CONFIGS])) for path in (CONFIGS / group).glob("*.yaml")}
    read = presets.get(settings[group], set())
    for name in given:
        others = [choice for choice, names in presets.items() if name in names]
        if others and name not in read:
            choice = f"{group}={settings[group]}"
            raise ValueError(f"{name} has no effect with {choice}: it is for {group}={', '.join(others)}")
    return set().union(*presets.values())


def _valid(path: tuple[str, ...], group: Mapping[str, Any], stated: Any) -> list[str] | None:
    """The names that a group takes, or None where only who reads it knows."""
    if path[-1] == "stages":
        return [*(name for name in group if str(name).isdigit()), "numbers of steps, such as 4"]
    kind = kind_of(path)
    options = None if kind is None else options_of(kind, group.get("name", "amed" if path[-1] == "inner" else None))
    if options is not None:
        own = kind == "schedule" and path[-1] == "schedule" and path[-2:-1] != ("noise_levels",)
        return [*["name"] * (kind not in WHOLE), *(o for o in options if not (own and o == "num_steps"))]
    if kind is None and isinstance(stated, Mapping) and stated:
        return [*map(str, stated)]
    return {"start": ["sigma", "statistics"], "model": MODEL}.get(path[-1])


def _check_known(
    group: Mapping[str, Any], valid: Sequence[str], path: tuple[str, ...], owner: str, everything: Mapping[str, Any]
) -> None:
    for name in group:
        if name not in valid:
            full = ".".join((*path, str(name)))
            guess = _meant(name, valid, path, everything)
            takes = ", ".join(valid)
            raise ValueError(
                f"unknown setting {full!r}{f' (did you mean {guess}?)' * bool(guess)}: {owner} takes {takes}"
            )


def _meant(name: str, valid: Sequence[str], path: tuple[str, ...], everything: Mapping[str, Any]) -> str:
    """The valid setting that is likely meant: one of this group, or one of the same name in another."""
    elsewhere = ELSEWHERE.get(name, "")
    near = elsewhere if elsewhere.partition(",")[0] in valid else nearest(name, valid)
    if near is not None:
        return ".".join((*path, near))
    same = {name, elsewhere}
    found = [(*place, n) for place, group in [((), everything), *mappings(everything)] for n in group if n in same]
    others = [place for place in found if place[:-1] != path]
    return ".".join(min(others, key=len)) if others else ""


def _check_complete(settings: Mapping[str, Any], defaults: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Refuse settings that were taken out, and single values in place of groups."""
    for name, default in defaults.items():
        full = ".".join((*path, name))
        if name not in settings:
            raise ValueError(f"{full} is missing: give {full}=VALUE")
        if not isinstance(default, Mapping) or kind_of((*path, name)) is not None:
            continue
        value = settings[name]
        if not isinstance(value, Mapping) and not (value is None and name in OPTIONAL):
            inside = f" of {', '.join(map(str, default))}" if default else ""
            raise ValueError(f"{full} must be a mapping{inside}, but is {value!r}")
        if isinstance(value, Mapping) and name not in LISTED:
            _check_complete(value, default, (*path, name))


def _hint(name: str, default: Any) -> Any:
    """What a setting must be; one that has no hint must be a number if its default has a point."""
    if isinstance(default, Mapping):
        return None  # a group is checked where it is used
    if name == "w" and isinstance(default, list):
        return Range
    return HINTS.get(name, Finite if isinstance(default, float) else None)


def _may_be_null(name: str, default: Any) -> bool:
    return default is None or (name in OPTIONAL and not isinstance(default, list))


def _at(node: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path of nested mappings, or None."""
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


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
