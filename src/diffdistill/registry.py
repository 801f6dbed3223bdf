"""Choose one of several by name, with errors that list what is valid."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
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
    hints = get_type_hints(make.__init__ if isinstance(make, type) else make, include_extras=True)
    check_names(what, options, valid)
    check_values(options, hints, what=what)
