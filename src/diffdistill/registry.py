"""Choose one of several by name, with errors that list what is valid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`; raise a `ValueError` that lists the valid names otherwise."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(sorted(table))}")
    return table[name]


def construct(kind: str, name: str, table: Mapping[str, Callable[..., T]], /, *args: Any, **options: Any) -> T:
    """Call `table[name](*args, **options)`; an option it does not have is a `TypeError` that lists those it has."""
    make = choose(kind, name, table)
    parameters = inspect.signature(make).parameters
    valid = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)][len(args) :]
    for option in options:
        if option not in valid:
            raise TypeError(f"{kind} {name!r} has no option {option!r}: it takes {', '.join(valid) or 'none'}")
    return make(*args, **options)
