"""Pickles read as data, by an interpreter of their instructions that can call nothing but the builders it is given.

Python's own unpickler imports and calls whatever a file names. This one knows a list of names; each stands for a
function of ours that builds a plain value or an inert record. Any other name ends the reading.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from diffdistill.interop.records import AllowList, Budget, ForeignFileError, Name, Record

MAX_NESTING = 2
MAX_INTEGER = 1024
"""Bytes of an integer."""
_MARK = object()
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_OPERATIONS: dict[int, Callable[[Machine], None]] = {}


class Machine:
    """The stack machine of the pickle format, protocols 0 to 5, on bytes.

    Args:
        data: the bytes; several pickles may follow each other.
        allowed: what names mean.
        budget: of the file.
        persistent: what a persistent id stands for, or None where there may be none.
        nesting: depth of streams within streams.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        allowed: AllowList,
        *,
        budget: Budget | None = None,
        persistent: Callable[[Any], Any] | None = None,
        nesting: int = 0,
    ) -> None:
        if nesting > MAX_NESTING:
            raise ForeignFileError(f"streams are nested more than {MAX_NESTING} deep")
        self.data = memoryview(data)
        self.allowed = allowed
        self.budget = budget or Budget()
        self.persistent = persistent
        self.nesting = nesting
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.hashes: dict[int, tuple[str, str]] = {}

    def load(self) -> Any:
        """The next pickle's value.

        Raises:
            UnsafePickleError: it names something that is not on the allow-list.
            ForeignFileError: it is damaged.
        """
        self.stack, self.memo = [], {}
        try:
            return self._run()
        except ForeignFileError:
            raise
        except (
            ValueError,
            TypeError,
            LookupError,
            OverflowError,
            ArithmeticError,
            AttributeError,
            struct.error,
        ) as error:
            raise ForeignFileError(f"damaged pickle, before byte {self.position}: {error}") from None
        except (RecursionError, MemoryError) as error:
            raise ForeignFileError(f"damaged pickle, before byte {self.position}: {type(error).__name__}") from None

    def _run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == ord("."):
                return self.pop()
            self.budget.spend()
            operation = _OPERATIONS.get(code)
            if operation is None:
                place = self.position - 1
                raise ForeignFileError(
                    f"unknown pickle instruction at byte {place}, where {bytes(self.data[place : place + 16])!r} stands"
                )
            operation(self)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes; they must be there."""
        if size < 0 or size > len(self.data) - self.position:
            raise ForeignFileError(f"truncated: {size} bytes are declared at byte {self.position}, but fewer are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def line(self) -> bytes:
        """Bytes up to the next end of line."""
        left, window = len(self.data) - self.position, 256
        while True:
            text = bytes(self.data[self.position : self.position + window])
            end = text.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return text[:end]
            if window >= left:
                raise ForeignFileError(f"truncated: no end of line after byte {self.position}")
            window *= 2

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, size: int) -> str:
        return str(self.take(size), "utf-8", "surrogatepass")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ForeignFileError("the pickle takes a value from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ForeignFileError("the pickle misses a mark")

    def top(self, kind: type, *more: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], (kind, *more)):
            raise ForeignFileError(f"the pickle expects a {kind.__name__} on its stack")
        return self.stack[-1]

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ForeignFileError("the pickle names an object by something that is not a string")
        return self.allowed.check(Name(_OLD_MODULES.get(module, module), name))

    def call(self, function: Any, args: Any) -> Any:
        """What REDUCE does: a builder of ours, found by its name."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise ForeignFileError("the pickle calls something that is not a name")
        builder = self.allowed.calls.get(str(function))
        if builder is not None:
            return builder(self, *args)
        return self.new(function, args)

    def new(self, kind: Any, args: Any) -> Any:
        """What NEWOBJ does: an empty dict or record in place of an object of a class."""
        if not isinstance(kind, Name) or not isinstance(args, tuple):
            raise ForeignFileError("the pickle makes an object of something that is not a class")
        if str(kind) in self.allowed.mappings:
            mapping: dict[Any, Any] = {}
            self.update(mapping, _flat(args[-1]) if args and isinstance(args[-1], (list, dict)) else [])
            return mapping
        if str(kind) in self.allowed.calls:
            raise ForeignFileError(f"the pickle makes an object of {kind}, which is a function")
        return Record(str(kind))

    def build(self, target: Any, state: Any) -> None:
        """What BUILD does: the state of a record; attributes of dictionaries are dropped."""
        if hasattr(target, "set_state"):
            target.set_state(self, state)
        elif isinstance(target, Record):
            parts = state if isinstance(state, tuple) else (state,)
            for part in parts:
                if isinstance(part, dict):
                    self.budget.spend(len(part))
                    target.state.update(part)
                elif part is not None:
                    target.state["state"] = part
        elif not isinstance(target, dict):
            raise ForeignFileError(f"the pickle sets the state of a {type(target).__name__}")

    def update(self, mapping: dict[Any, Any], items: list[Any]) -> None:
        """Set keys and values, which alternate in `items`."""
        if len(items) % 2:
            raise ForeignFileError("the pickle has a key without a value")
        self.budget.spend(len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            mapping[_key(key)] = value


def _flat(pairs: list[Any] | dict[Any, Any]) -> list[Any]:
    """Keys and values in turn, of a dictionary or a list of pairs."""
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ForeignFileError("the pickle makes a dictionary of something other than pairs")
    return [value for pair in pairs for value in pair]


def _key(value: Any) -> Any:
    """A key of a dictionary or an item of a set: a plain value."""
    # Tuples and long integers take long to hash, again at every use, and can be chosen to have one hash in common.
    if not (value is None or isinstance(value, (str, bytes, int, float, Name))):
        raise ForeignFileError(f"the pickle uses a {type(value).__name__} as a key")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ForeignFileError("the pickle uses an integer of more than 64 bits as a key")
    return value


def _operation(*codes: str) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    def register(function: Callable[[Machine], None]) -> Callable[[Machine], None]:
        for code in codes:
            _OPERATIONS[ord(code)] = function
        return function

    return register


def _pushes(code: str, value: Callable[[Machine], Any]) -> None:
    _OPERATIONS[ord(code)] = lambda m: m.stack.append(value(m))


def _replaces(code: str, count: int, value: Callable[..., Any]) -> None:
    def operate(m: Machine) -> None:
        args = [m.pop() for _ in range(count)][::-1]
        m.stack.append(value(m, *args))

    _OPERATIONS[ord(code)] = operate


def _gathers(code: str, value: Callable[[Machine, list[Any]], Any]) -> None:
    _OPERATIONS[ord(code)] = lambda m: m.stack.append(value(m, m.pop_to_mark()))


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
    return {_key(item) for item in items}


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
_pushes("(", lambda m: _MARK)
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

    _OPERATIONS[ord(code)] = operate


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
