"""The machine under `pickles`: a stack, a memo and a list of names, and what instructions may do with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from diffdistill.interop.containers.records import AllowList, Budget, ForeignFileError, Name, Record

MAX_NESTING = 2
MARK = object()
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
OPERATIONS: dict[int, Callable[[Machine], None]] = {}
"""The instructions by their codes, which `pickles` fills in."""


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
            operation = OPERATIONS.get(code)
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
        if not self.stack or self.stack[-1] is MARK:
            raise ForeignFileError("the pickle takes a value from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
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
        return self.allowed.check(Name(OLD_MODULES.get(module, module), name))

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
            mapping[plain_key(key)] = value


def _flat(pairs: list[Any] | dict[Any, Any]) -> list[Any]:
    """Keys and values in turn, of a dictionary or a list of pairs."""
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ForeignFileError("the pickle makes a dictionary of something other than pairs")
    return [value for pair in pairs for value in pair]


def plain_key(value: Any) -> Any:
    """A key of a dictionary or an item of a set: a plain value."""
    # Tuples and long integers take long to hash, again at every use, and can be chosen to have one hash in common.
    if not (value is None or isinstance(value, (str, bytes, int, float, Name))):
        raise ForeignFileError(f"the pickle uses a {type(value).__name__} as a key")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ForeignFileError("the pickle uses an integer of more than 64 bits as a key")
    return value
