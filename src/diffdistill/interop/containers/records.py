"""What a foreign pickle is read into, and what it may not exceed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_INSTRUCTIONS = 2_000_000
"""More than any public checkpoint needs; with this, what a file makes us allocate is bounded."""
MAX_TENSORS = 2**16
"""The same for the tensors of a file, which one table can list again and again."""


class ForeignFileError(ValueError):
    """A file that cannot be read: truncated, damaged, of an unknown layout, or refused."""


class UnsafePickleError(ForeignFileError):
    """A pickle that names something outside the allow-list. Nothing of it was executed."""


@dataclass(frozen=True)
class Name:
    """The name of a class or function, as a file gives it. It refers to nothing."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def shown(value: Any, length: int = 40) -> str:
    """The beginning of a plain value in an error; of others the type, as a nested value may take forever to write."""
    if value is None or isinstance(value, (str, int, float, Name)):
        return str(value)[:length]
    return f"a {type(value).__name__}"


@dataclass(eq=False)
class Record:
    """An object of a class that we do not have, as data.

    Attributes:
        kind: name of its class.
        state: its attributes.
        source_sha256: hash of the source code that a persistent object carries; the code itself is dropped, unread.
    """

    kind: str
    state: dict[Any, Any] = field(default_factory=dict)
    source_sha256: str | None = None


class Budget:
    """Limits on what one file may allocate and execute, shared by everything nested in it."""

    def __init__(self, instructions: int = MAX_INSTRUCTIONS) -> None:
        self.left = instructions

    def spend(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left < 0:
            raise ForeignFileError(f"the pickle takes more than {MAX_INSTRUCTIONS} instructions: no checkpoint does")


@dataclass(frozen=True)
class AllowList:
    """The names that a pickle may use, and what stands for each.

    Attributes:
        calls: functions that may be called, as `builder(machine, *args)`.
        mappings: classes of dictionaries; their objects become dicts.
        inert: beginnings of names of classes whose objects become records.
    """

    calls: Mapping[str, Callable[..., Any]]
    mappings: frozenset[str]
    inert: tuple[str, ...]

    def check(self, name: Name) -> Name:
        full = str(name)
        if full not in self.calls and full not in self.mappings and not full.startswith(self.inert):
            raise UnsafePickleError(f"the pickle asks for {full}, which is not on the allow-list: nothing was executed")
        return name
