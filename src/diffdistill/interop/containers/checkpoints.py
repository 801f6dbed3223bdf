"""The containers of checkpoints: pickles, both formats of `torch.save` (not by its unpickler), safetensors, GGUF."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.errors import one_line
from diffdistill.interop.containers.gguf import MAGIC, read_gguf
from diffdistill.interop.containers.pickles import Machine
from diffdistill.interop.containers.records import MAX_TENSORS, AllowList, Budget, ForeignFileError, Name, shown
from diffdistill.interop.containers.tensors import ALLOWED, CALLS, STORAGES, ArrayRecord, Raw, Storage, TensorRecord
from diffdistill.interop.containers.wrappings import unwrapped

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, ValueError, LookupError, ArithmeticError, AttributeError),
    *(OSError, RuntimeError, EOFError, MemoryError),
)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a file holds, as plain values and records.

    Attributes:
        root: the pickled value, without what training programs put around a state dict.
        nbytes: size of the file; nothing taken from it may be larger in all.
        metadata: what the header of a safetensors file says, by name.
    """

    root: Any
    nbytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Mapping[Any, Any]:
        """The state dict: the root, or what it holds under `state_dict`; empty if there is none."""
        state = self.root.get("state_dict", self.root) if isinstance(self.root, dict) else None
        return state if isinstance(state, dict) else {}

    def tensors(self, records: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a state dict.

        Raises:
            ForeignFileError: an entry is not a tensor, or the tensors together are larger than the file.
        """
        wrong = next(
            (name for name, value in records.items() if not isinstance(value, (TensorRecord, ArrayRecord))), None
        )
        if wrong is not None:
            raise ForeignFileError(f"entry {str(wrong)[:80]!r} of the state is not a tensor")
        # Tensors of one storage are read together, so that it is read once.
        groups: dict[Storage | None, list[str]] = {}
        for name, value in records.items():
            groups.setdefault(value.storage if isinstance(value, TensorRecord) else None, []).append(name)
        stored = sum(storage.nbytes for storage in groups if storage is not None)
        if max(stored, sum(value.nbytes for value in records.values())) > self.nbytes:
            raise ForeignFileError("the tensors of the state are larger than the file: they repeat the same data")
        tensors: dict[str, Tensor] = {}
        for storage, names in groups.items():
            raw = None if storage is None else storage.bytes()
            for name in names:
                record = records[name]
                tensors[name] = record.tensor(raw) if isinstance(record, TensorRecord) else record.tensor()
        return {name: tensors[name] for name in records}


@contextlib.contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[ForeignCheckpoint]:
    """Open a pickle, or a file of `torch.save` or safetensors; its tensors can be read until the block ends.

    Nothing is executed.

    Raises:
        UnsafePickleError: it names something outside the allow-list.
        ForeignFileError: it is truncated, damaged, or of another format.
    """
    path, metadata = Path(path), {}
    try:
        with contextlib.ExitStack() as stack:
            with open(path, "rb") as file:
                start = file.read(9)
            size = path.stat().st_size
            if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
                root, metadata = _read_safetensors(path, size)
            elif start.startswith(MAGIC):
                root = read_gguf(path)
                size = sum(record.nbytes for record in root.values())  # decoded, which the blocks in the file bound
            elif start.startswith(b"PK\x03\x04"):
                with _damaged_archives():
                    archive = stack.enter_context(zipfile.ZipFile(path))
                root = _read_zip(archive, size)
            else:
                root = read_stream(path.read_bytes())
            yield ForeignCheckpoint(unwrapped(root), size, metadata)
    except ForeignFileError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None


@contextlib.contextmanager
def _damaged_archives() -> Iterator[None]:
    """Whatever the zip module ends in when its input is damaged, as the documented error."""
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ForeignFileError(f"damaged archive: {one_line(error)}") from None


def read_stream(data: Raw, *, nesting: int = 0, budget: Budget | None = None) -> Any:
    """Read a plain pickle, or the older format of `torch.save`: a stream of pickles, then the numbers."""
    storages: dict[str, Storage] = {}
    machine = Machine(data, FULL, budget=budget, nesting=nesting)
    root = machine.load()
    if type(root) is not int or root != _MAGIC:
        return root
    if machine.load() != _PROTOCOL:
        raise ForeignFileError("unknown version of the format of torch.save")
    system = machine.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ForeignFileError("the file was written on a big-endian machine")
    machine.persistent = lambda identity: _storage(identity, storages)
    root = machine.load()
    machine.persistent = None
    keys = machine.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ForeignFileError("the file lists storages that it does not use")
    for key in keys:
        storage = storages[key]
        numel = machine.number("<q")
        if numel != storage.numel:
            raise ForeignFileError(f"a storage has {numel} numbers, but {storage.numel} are declared")
        storage.read = _constant(machine.take(storage.nbytes))
    if any(storage.read is None for storage in storages.values()):
        raise ForeignFileError("the file declares a storage that it does not hold")
    return root


def _constant(raw: Raw) -> Callable[[], Raw]:
    return lambda: raw


def _storage(identity: Any, storages: dict[str, Storage], read: Callable[[str], Raw] | None = None) -> Any:
    """What a persistent id of `torch.save` stands for: `("storage", type, key, location, numel[, view])`."""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module" and isinstance(identity[1], Name):
        return identity[1]
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ForeignFileError("damaged reference to a storage")
    kind, key, numel, view = itemgetter(1, 2, 4, slice(5, None))(identity)
    if not isinstance(key, str) or type(numel) is not int or numel < 0 or view not in ((), (None,)):
        raise ForeignFileError("damaged reference to a storage")
    dtype = STORAGES.get(shown(kind))
    if dtype is None:
        raise ForeignFileError(f"storages of the type {shown(kind)} are not read")
    if key not in storages:
        storages[key] = Storage(dtype, numel, None if read is None else lambda: read(key))
    storage = storages[key]
    if storage.numel != numel or storage.dtype != dtype:
        raise ForeignFileError(f"storage {key[:20]!r} is declared twice, differently")
    return storage


def _read_zip(archive: zipfile.ZipFile, size: int) -> Any:
    """Read the newer format of `torch.save`: an archive of one pickle and one file for each storage, uncompressed."""
    entries = {info.filename: info for info in archive.infolist()}
    pickle = next((name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if pickle is None:
        held = ", ".join(name[:40] for name in list(entries)[:5]) or "nothing"
        raise ForeignFileError(f"the archive is not of torch.save, and is to be unpacked first: it holds {held}")
    folder = pickle.partition("/")[0]

    def read(name: str) -> bytes:
        info = entries.get(f"{folder}/{name}")
        if info is None:
            raise ForeignFileError(f"the archive misses {name[:80]}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ForeignFileError(f"{name[:80]} in the archive is compressed, or larger than the file")
        with _damaged_archives():
            return archive.read(info)

    if f"{folder}/byteorder" in entries and read("byteorder") != b"little":
        raise ForeignFileError("the file was written on a big-endian machine")
    storages: dict[str, Storage] = {}
    machine = Machine(
        read("data.pkl"),
        FULL,
        persistent=lambda identity: _storage(identity, storages, lambda key: read(f"data/{key}")),
    )
    return machine.load()


MAX_HEADER = 100_000_000
"""Bytes of a header of safetensors, by its format."""
SAFE_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file, and what it says of itself."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ForeignFileError(f"the header of the safetensors file has {length} bytes")
            header = json.loads(file.read(length))
        metadata = {str(name): str(value) for name, value in dict(header.pop("__metadata__", None) or {}).items()}
        if len(header) > MAX_TENSORS:
            raise ForeignFileError(f"the safetensors file lists {len(header)} tensors")
        return {name: _safe_record(path, entry, 8 + length, size) for name, entry in header.items()}, metadata
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError("damaged header of a safetensors file") from None


def _safe_record(path: Path, entry: Mapping[str, Any], start: int, size: int) -> TensorRecord:
    if entry["dtype"] not in SAFE_DTYPES:
        raise ForeignFileError(
            f"tensors of the type {shown(entry['dtype'])} are not read: {', '.join(SAFE_DTYPES)} are"
        )
    shape, (begin, end), dtype = tuple(entry["shape"][:9]), entry["data_offsets"], SAFE_DTYPES[entry["dtype"]]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or start + end > size:
        raise ForeignFileError("a tensor of the safetensors file lies outside it")
    numel = math.prod(shape)
    if end - begin != numel * dtype.itemsize:
        raise ForeignFileError(f"a tensor of size {list(shape)} is declared in {end - begin} bytes")

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(start + begin)
            return file.read(end - begin)

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorRecord(Storage(dtype, numel, read), 0, shape, stride)


def _nested(m: Machine, data: Any) -> Any:
    """`torch.storage._load_from_bytes`: torch would unpickle these bytes; here they are a stream like any other."""
    if not isinstance(data, (bytes, memoryview)):
        raise ForeignFileError("a nested stream is not made of bytes")
    m.budget.spend(len(data) // 4096)  # the same bytes can be given again and again
    value = read_stream(data, nesting=m.nesting + 1, budget=m.budget)
    if not isinstance(value, (Storage, TensorRecord)):
        raise ForeignFileError("a nested stream holds something other than a storage or a tensor")
    return value


FULL: AllowList = replace(ALLOWED, calls={**CALLS, "torch.storage._load_from_bytes": _nested})


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a pickle of (nested) dictionaries of arrays, such as EDM2's reference statistics.

    Returns:
        Dictionaries of numpy arrays (tensors become arrays too), numbers and strings.

    Raises:
        UnsafePickleError: it names something outside the allow-list.
        ForeignFileError: it is truncated, damaged, or holds anything else.
    """
    with open_checkpoint(path) as checkpoint:
        left = [checkpoint.nbytes]
        try:
            result = _arrays(checkpoint.root, left, depth=0)
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise ForeignFileError(one_line(error)) from None
    if not isinstance(result, dict):
        raise ForeignFileError(f"{path} holds no dictionary of arrays")
    return result


def _arrays(value: Any, left: list[int], *, depth: int) -> Any:
    left[0] -= 1 + (value.nbytes if isinstance(value, (ArrayRecord, TensorRecord)) else 0)
    if left[0] < 0 or depth > 4:
        raise ForeignFileError("the dictionaries are nested too deep, or repeat the same data")
    if isinstance(value, dict):
        return {str(key): _arrays(item, left, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, ArrayRecord):
        return value.array()
    if isinstance(value, TensorRecord):
        return np.asarray(value.tensor())
    if isinstance(value, (int, float, str)) or value is None:
        return value
    raise ForeignFileError(f"a {type(value).__name__} is among the arrays")
