"""The validator of settings: annotations say what a value must be, and errors name the nearest valid name.

Options of solvers and networks, settings of the trainer, entries of tables, hints on files and the settings of scripts
are all checked here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, SupportsFloat, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Limit:
    """What an `Annotated` type asks of its values: `words` complete "must be ..."."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True


Integer = Annotated[int, Limit("an integer")]
Natural = Annotated[int, Limit("an integer of at least 0", lambda value: value >= 0)]
Count = Annotated[int, Limit("an integer of at least 1", lambda value: value >= 1)]
Finite = Annotated[float, Limit("a finite number", math.isfinite)]
Positive = Annotated[float, Limit("a positive number", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[float, Limit("a number of at least 0", lambda value: 0 <= value < math.inf)]
Name = Annotated[str, Limit("a name or a path", bool)]

STRICT: dict[Any, type] = {int: Integral, float: Real}
"""What `Annotated` numbers are; without a limit, whatever becomes a float is left to who takes it."""
CHECKED: dict[Any, tuple[type, str]] = {
    float: (SupportsFloat, "a number"),
    int: (SupportsFloat, "an integer"),  # whether it is whole is seen by who takes it
    bool: (bool, "true or false"),
    str: (str, "text"),
    Mapping: (Mapping, "a mapping"),
    dict: (Mapping, "a mapping"),
    Sequence: (Sequence, "a list"),
    NoneType: (NoneType, "null"),
}
"""Types of options whose values are checked, and their names in words; all else passes."""
NEITHER: dict[type, type] = {SupportsFloat: bool, Sequence: str}
"""What is of such a type in Python alone."""


def mismatch(value: Any, hint: Any) -> str:
    """Expected type in words; empty if `value` matches."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [mismatch(value, part) for part in parts]
        return " or ".join(found) if all(found) else ""
    if origin is Annotated:
        kind, limit = parts
        try:
            good = isinstance(value, STRICT.get(kind, object)) and not mismatch(value, kind) and limit.holds(value)
        except (TypeError, ValueError):
            good = False
        return "" if good else limit.words
    if origin is Literal:
        known = isinstance(value, (str, int)) and any(value == p and type(value) is type(p) for p in parts)
        return "" if known else f"one of {', '.join(map(str, parts))}"
    if origin is Sequence and isinstance(value, (list, tuple)):
        wrong = next(filter(None, (mismatch(entry, parts[0]) for entry in value)), "")
        return f"a list, and each of it {wrong}" if wrong else ""
    kind, words = CHECKED.get(origin or hint, (object, ""))
    return "" if isinstance(value, kind) and not isinstance(value, NEITHER.get(kind, ())) else words


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], *, what: str = "") -> None:
    """Refuse values that do not match their annotations; names without one pass.

    Args:
        values: the settings.
        hints: what each must be: types, `Annotated` with a `Limit`, unions and `Literal`.
        what: what they belong to, for messages.

    Raises:
        ValueError: names the first wrong value, and what it must be.
    """
    for name, value in values.items():
        words = mismatch(value, hints.get(name, Any))
        if words:
            raise ValueError(f"{f'{what}: ' * bool(what)}{name} must be {words}, but is {value!r}")


def check_names(
    what: str,
    given: Iterable[str],
    valid: Iterable[str],
    *,
    noun: str = "option",
    error: type[Exception] = TypeError,
) -> None:
    """Refuse names that are not valid: `error` names the first, all valid ones, and the nearest of them."""
    valid = [*valid]
    for name in given:
        if name not in valid:
            takes = ", ".join(valid) or "none"
            raise error(f"{what} has no {noun} {name!r}: it takes {takes}{did_you_mean(name, valid)}")


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with their limits."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(settings: Any, *, what: str = "") -> None:
    """`check_values` for a dataclass, whose annotations say what its fields must be."""
    hints = hints_of(type(settings))
    check_values({name: getattr(settings, name) for name in hints}, hints, what=what)


def nearest(name: Any, valid: Iterable[str]) -> str | None:
    """The valid name that is likely meant, if there is one."""
    found = difflib.get_close_matches(str(name).lower(), [*valid], n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: Any, valid: Iterable[str]) -> str:
    """The nearest valid name as a question in brackets, or nothing."""
    near = nearest(name, valid)
    return f" (did you mean {near}?)" if near is not None and near != name else ""
