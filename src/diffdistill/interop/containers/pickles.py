"""Pickles read as data, by an interpreter of their instructions that can call nothing but the builders it is given.

Python's own unpickler imports and calls whatever a file names. This one knows a list of names; each stands for a
function of ours that builds a plain value or an inert record. Any other name ends the reading.
"""

from __future__ import annotations

import codecs
import pickletools
from collections.abc import Callable
from typing import Any

from diffdistill.interop.containers.pickle_machine import MARK, OPERATIONS, Machine, plain_key
from diffdistill.interop.containers.records import ForeignFileError

__all__ = ["Machine", "make_set"]

MAX_INTEGER = 1024
"""Bytes of an integer."""
CODES = {instruction.name: ord(instruction.code) for instruction in pickletools.opcodes}
"""The instructions' codes by their names. `pickletools` could read their arguments too, but it copies every array out
of the file, and bounds no integer."""


def _operation(name: str) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        OPERATIONS[CODES[name]] = function
        return function

    return register


def _pushes(name: str, value: Callable[[Machine], Any]) -> None:
    OPERATIONS[CODES[name]] = lambda m: m.stack.append(value(m))


def _replaces(name: str, count: int, value: Callable[..., Any]) -> None:
    def operate(m: Machine) -> None:
        args = [m.pop() for _ in range(count)][::-1]
        m.stack.append(value(m, *args))

    OPERATIONS[CODES[name]] = operate


def _gathers(name: str, value: Callable[[Machine, list[Any]], Any]) -> None:
    OPERATIONS[CODES[name]] = lambda m: m.stack.append(value(m, m.pop_to_mark()))


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
_pushes("NONE", lambda m: None)
_pushes("NEWTRUE", lambda m: True)
_pushes("NEWFALSE", lambda m: False)
_pushes("INT", lambda m: _integer(m.line()))
_pushes("LONG", lambda m: _integer(m.line()))
_pushes("BININT", lambda m: m.number("<i"))
_pushes("BININT1", lambda m: m.number("<B"))
_pushes("BININT2", lambda m: m.number("<H"))
_pushes("LONG1", lambda m: _long(m, m.number("<B")))
_pushes("LONG4", lambda m: _long(m, m.number("<i")))
_pushes("FLOAT", lambda m: float(m.line()))
_pushes("BINFLOAT", lambda m: m.number(">d"))
_pushes("STRING", lambda m: _quoted(m.line()))
_pushes("BINSTRING", lambda m: str(m.take(m.number("<i")), "latin-1"))
_pushes("SHORT_BINSTRING", lambda m: str(m.take(m.number("<B")), "latin-1"))
_pushes("UNICODE", lambda m: str(m.line(), "raw-unicode-escape"))
_pushes("BINUNICODE", lambda m: m.text(m.number("<I")))
_pushes("SHORT_BINUNICODE", lambda m: m.text(m.number("<B")))
_pushes("BINUNICODE8", lambda m: m.text(m.number("<Q")))
# Bytes stay views of the file.
_pushes("BINBYTES", lambda m: m.take(m.number("<I")))
_pushes("SHORT_BINBYTES", lambda m: m.take(m.number("<B")))
_pushes("BINBYTES8", lambda m: m.take(m.number("<Q")))
_pushes("BYTEARRAY8", lambda m: m.take(m.number("<Q")))

# Containers.
_pushes("EMPTY_LIST", lambda m: [])
_pushes("EMPTY_TUPLE", lambda m: ())
_pushes("EMPTY_DICT", lambda m: {})
_pushes("EMPTY_SET", lambda m: set())
_pushes("MARK", lambda m: MARK)
_gathers("LIST", lambda m, items: items)
_gathers("TUPLE", lambda m, items: tuple(items))
_gathers("DICT", _dictionary)
_gathers("FROZENSET", make_set)
_replaces("TUPLE1", 1, lambda m, a: (a,))
_replaces("TUPLE2", 2, lambda m, a, b: (a, b))
_replaces("TUPLE3", 3, lambda m, a, b, c: (a, b, c))

# Names, and what is made of them.
_pushes("GLOBAL", lambda m: m.name(str(m.line(), "utf-8"), str(m.line(), "utf-8")))
_replaces("STACK_GLOBAL", 2, lambda m, module, name: m.name(module, name))
_replaces("REDUCE", 2, lambda m, function, args: m.call(function, args))
_replaces("NEWOBJ", 2, lambda m, kind, args: m.new(kind, args))
_replaces("NEWOBJ_EX", 3, lambda m, kind, args, options: m.new(kind, args))
_pushes("PERSID", lambda m: _resolved(m, str(m.line(), "ascii")))
_replaces("BINPERSID", 1, lambda m, identity: _resolved(m, identity))

# The memo.
_pushes("GET", lambda m: _memoized(m, int(m.line())))
_pushes("BINGET", lambda m: _memoized(m, m.number("<B")))
_pushes("LONG_BINGET", lambda m: _memoized(m, m.number("<I")))


def _memoize(name: str, index: Callable[[Machine], int]) -> None:
    def operate(m: Machine) -> None:
        m.memo[index(m)] = m.top(object)

    OPERATIONS[CODES[name]] = operate


_memoize("PUT", lambda m: int(m.line()))
_memoize("BINPUT", lambda m: m.number("<B"))
_memoize("LONG_BINPUT", lambda m: m.number("<I"))
_memoize("MEMOIZE", lambda m: len(m.memo))


@_operation("PROTO")
def _protocol(m: Machine) -> None:
    if m.number("<B") > 5:
        raise ForeignFileError("a pickle protocol above 5")


@_operation("FRAME")
def _frame(m: Machine) -> None:
    size = m.number("<Q")
    if size > len(m.data) - m.position:
        raise ForeignFileError(f"truncated: a frame of {size} bytes is declared, but fewer are left")


@_operation("POP")
def _pop(m: Machine) -> None:
    if not m.stack:
        raise ForeignFileError("the pickle takes a value from an empty stack")
    m.stack.pop()


@_operation("POP_MARK")
def _pop_mark(m: Machine) -> None:
    m.pop_to_mark()


@_operation("DUP")
def _duplicate(m: Machine) -> None:
    m.stack.append(m.top(object))


@_operation("APPEND")
def _append(m: Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


@_operation("APPENDS")
def _extend(m: Machine) -> None:
    items = m.pop_to_mark()
    m.top(list).extend(items)


@_operation("SETITEM")
def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.update(m.top(dict), [key, value])


@_operation("SETITEMS")
def _set_items(m: Machine) -> None:
    items = m.pop_to_mark()
    m.update(m.top(dict), items)


@_operation("ADDITEMS")
def _add_items(m: Machine) -> None:
    items = m.pop_to_mark()
    m.top(set).update(make_set(m, items))


@_operation("BUILD")
def _build(m: Machine) -> None:
    state = m.pop()
    m.build(m.top(object), state)
