"""Choose one of several by name, with errors that list what is valid."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar, get_type_hints

from diffdistill.settings import check_names, check_values, did_you_mean

T = TypeVar("T")


def resolve(entry: T | str) -> T:
    """An entry of a table of things to call: itself, or what the import path `"package.module:name"` names.

    Import paths let a room list what lies in rooms above it, which are imported when they are asked for.
    """
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


_MADE_BY: dict[tuple[str, str], tuple[str, str]] = {}
"""Module and name of what users entered, by kind and name."""


def enter(kind: str, name: str, table: MutableMapping[str, Any], entry: Any, *, made_by: Any = None) -> None:
    """Put an entry of a user into a table, under a new name; a reload, or a cell run again, replaces its own.

    Args:
        kind: what the table holds, in words.
        name: a word of letters, digits, "_" and "-".
        table: where to put it.
        entry: what to put there.
        made_by: the class or function that the user wrote, where it is not the entry itself.

    Raises:
        ValueError: the name is no word, or is taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise ValueError(f"the name of a {kind} is a word of letters, digits, _ and -, not {name!r}")
    maker = entry if made_by is None else made_by
    place = str(getattr(maker, "__module__", "")), str(getattr(maker, "__qualname__", ""))
    if name in table and _MADE_BY.get((kind, name)) != place:
        raise ValueError(f"the {kind} name {name!r} is taken: choose another; these are: {', '.join(sorted(table))}")
    table[name], _MADE_BY[kind, name] = entry, place


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`; raise a `ValueError` that lists the valid names otherwise."""
    if not isinstance(name, str) or name not in table:
        guess = did_you_mean(name, table)
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(sorted(table))}{guess}")
    return table[name]


def construct(kind: str, name: str, table: Mapping[str, Callable[..., T] | str], /, *args: Any, **options: Any) -> T:
    """Call `table[name](*args, **options)` after `check_options`; the entry may be an import path, see `resolve`."""
    make: Callable[..., T] = resolve(choose(kind, name, table))
    check_options(f"{kind} {name!r}", make, options, positional=len(args))
    return make(*args, **options)


def check_options(what: str, make: Callable[..., Any], options: Mapping[str, Any], *, positional: int = 0) -> None:
    """Refuse options that a function does not have, and values that are not what its annotations say.

    Of the annotations, numbers, truth values, texts and mappings are checked.

    Args:
        what: names the function in messages.
        make: the function, or the class.
        options: what it is to be called with by name.
        positional: how many of its arguments are given by position.

    Raises:
        TypeError: an option that it does not have; lists those that it has.
        ValueError: a value of another type; names the option and what it takes.
    """
    parameters = inspect.signature(make).parameters
    valid = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)][positional:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    check_names(what, [] if takes_any else options, valid)
    check_values(options, _hints(make.__init__ if isinstance(make, type) else make), what=what)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function; none where they name what is imported for type checkers alone."""
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:
        return {}
