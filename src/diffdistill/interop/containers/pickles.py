"""Pickles read as data, by an interpreter of their instructions that can call nothing but the builders it is given.

Python's own unpickler imports and calls whatever a file names. This one knows a list of names; each stands for a
function of ours that builds a plain value or an inert record. Any other name ends the reading.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from diffdistill.interop.containers.pickle_machine import MARK, OPERATIONS, Machine, plain_key
from diffdistill.interop.containers.records import ForeignFileError

__all__ = ["Machine", "make_set"]

MAX_INTEGER = 1024
"""Bytes of an integer."""


def _operation(*codes: str) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        for code in codes:
            OPERATIONS[ord(code)] = function
        return function

    return register


def _pushes(code: str, value: Callable[[Machine], Any]) -> None:
    OPERATIONS[ord(code)] = lambda m: m.stack.append(value(m))


def _replaces(code: str, count: int, value: Callable[..., Any]) -> None:
    def operate(m: Machine) -> None:
        args = [m.pop() for _ in range(count)][::-1]
        m.stack.append(value(m, *args))

    OPERATIONS[ord(code)] = operate


def _gathers(code: str, value: Callable[[Machine, list[Any]], Any]) -> None:
    OPERATIONS[ord(code)] = lambda m: m.stack.append(value(m, m.pop_to_mark()))


def _integer(line: bytes) -> Any:
    return line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L"))


def _quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
        raise ForeignFileError("the pickle has a string without quotes")
    return codecs.escape_decode(line[1:-1])[0].decode("latin-1")  # pyright: ignore


def _long(m: Machine, size: int) -> int:
    if size > MAX_INTEGER:
        raise ForeignFileError(f"the pickle has an integer of {size} bytes")
    return int.from_bytes(m.take(size), "little", signed=True)


def _dictionary(m: Machine, items: list[Any]) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    m.update(mapping, items)
    return mapping


def make_set(m: Machine, items: Any = ()) -> set[Any]:
    """A set of plain values."""
    if not isinstance(items, (list, tuple, set)):
        raise ForeignFileError("the pickle makes a set of something that is not a list")
    m.budget.spend(len(items))
    return {plain_key(item) for item in items}


def _memoized(m: Machine, index: Any) -> Any:
    if index not in m.memo:
        raise ForeignFileError(f"the pickle refers to an entry {index} that it does not have")
    return m.memo[index]


def _resolved(m: Machine, identity: Any) -> Any:
    if m.persistent is None:
        raise ForeignFileError("the pickle refers to data outside itself")
    return m.persistent(identity)


# Plain values.
_pushes("N", lambda m: None)
_pushes("\x88", lambda m: True)
_pushes("\x89", lambda m: False)
_pushes("I", lambda m: _integer(m.line()))
_pushes("L", lambda m: _integer(m.line()))
_pushes("J", lambda m: m.number("<i"))
_pushes("K", lambda m: m.number("<B"))
_pushes("M", lambda m: m.number("<H"))
_pushes("\x8a", lambda m: _long(m, m.number("<B")))
_pushes("\x8b", lambda m: _long(m, m.number("<i")))
_pushes("F", lambda m: float(m.line()))
_pushes("G", lambda m: m.number(">d"))
_pushes("S", lambda m: _quoted(m.line()))
_pushes("T", lambda m: str(m.take(m.number("<i")), "latin-1"))
_pushes("U", lambda m: str(m.take(m.number("<B")), "latin-1"))
_pushes("V", lambda m: str(m.line(), "raw-unicode-escape"))
_pushes("X", lambda m: m.text(m.number("<I")))
_pushes("\x8c", lambda m: m.text(m.number("<B")))
_pushes("\x8d", lambda m: m.text(m.number("<Q")))
# Bytes stay views of the file.
_pushes("B", lambda m: m.take(m.number("<I")))
_pushes("C", lambda m: m.take(m.number("<B")))
_pushes("\x8e", lambda m: m.take(m.number("<Q")))
_pushes("\x96", lambda m: m.take(m.number("<Q")))

# Containers.
_pushes("]", lambda m: [])
_pushes(")", lambda m: ())
_pushes("}", lambda m: {})
_pushes("\x8f", lambda m: set())
_pushes("(", lambda m: MARK)
_gathers("l", lambda m, items: items)
_gathers("t", lambda m, items: tuple(items))
_gathers("d", _dictionary)
_gathers("\x91", make_set)
_replaces("\x85", 1, lambda m, a: (a,))
_replaces("\x86", 2, lambda m, a, b: (a, b))
_replaces("\x87", 3, lambda m, a, b, c: (a, b, c))

# Names, and what is made of them.
_pushes("c", lambda m: m.name(str(m.line(), "utf-8"), str(m.line(), "utf-8")))
_replaces("\x93", 2, lambda m, module, name: m.name(module, name))
_replaces("R", 2, lambda m, function, args: m.call(function, args))
_replaces("\x81", 2, lambda m, kind, args: m.new(kind, args))
_replaces("\x92", 3, lambda m, kind, args, options: m.new(kind, args))
_pushes("P", lambda m: _resolved(m, str(m.line(), "ascii")))
_replaces("Q", 1, lambda m, identity: _resolved(m, identity))

# The memo.
_pushes("g", lambda m: _memoized(m, int(m.line())))
_pushes("h", lambda m: _memoized(m, m.number("<B")))
_pushes("j", lambda m: _memoized(m, m.number("<I")))


def _memoize(code: str, index: Callable[[Machine], int]) -> None:
    def operate(m: Machine) -> None:
        m.memo[index(m)] = m.top(object)

    OPERATIONS[ord(code)] = operate


_memoize("p", lambda m: int(m.line()))
_memoize("q", lambda m: m.number("<B"))
_memoize("r", lambda m: m.number("<I"))
_memoize("\x94", lambda m: len(m.memo))


@_operation("\x80")
def _protocol(m: Machine) -> None:
    if m.number("<B") > 5:
        raise ForeignFileError("a pickle protocol above 5")


@_operation("\x95")
def _frame(m: Machine) -> None:
    size = m.number("<Q")
    if size > len(m.data) - m.position:
        raise ForeignFileError(f"truncated: a frame of {size} bytes is declared, but fewer are left")


@_operation("0")
def _pop(m: Machine) -> None:
    if not m.stack:
        raise ForeignFileError("the pickle takes a value from an empty stack")
    m.stack.pop()


@_operation("1")
def _pop_mark(m: Machine) -> None:
    m.pop_to_mark()


@_operation("2")
def _duplicate(m: Machine) -> None:
    m.stack.append(m.top(object))


@_operation("a")
def _append(m: Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


@_operation("e")
def _extend(m: Machine) -> None:
    items = m.pop_to_mark()
    m.top(list).extend(items)


@_operation("s")
def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.update(m.top(dict), [key, value])


@_operation("u")
def _set_items(m: Machine) -> None:
    items = m.pop_to_mark()
    m.update(m.top(dict), items)


@_operation("\x90")
def _add_items(m: Machine) -> None:
    items = m.pop_to_mark()
    m.top(set).update(make_set(m, items))


@_operation("b")
def _build(m: Machine) -> None:
    state = m.pop()
    m.build(m.top(object), state)
