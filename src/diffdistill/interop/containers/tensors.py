"""Tensors and arrays as pickles describe them, checked before anything is allocated, and the list of allowed names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.interop.containers.pickles import Machine, make_set
from diffdistill.interop.containers.records import AllowList, ForeignFileError, Name, Record, shown

STORAGES: dict[str, torch.dtype] = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage.UntypedStorage": torch.uint8,
}

Raw = bytes | memoryview


@dataclass(eq=False)
class Storage:
    """A run of numbers in a file, read when it is needed.

    Attributes:
        dtype, numel: as the file declares them.
        read: gives the bytes; None until their place is known.
    """

    dtype: torch.dtype
    numel: int
    read: Callable[[], Raw] | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def bytes(self) -> Raw:
        if self.read is None:
            raise ForeignFileError("the file declares a storage that it does not hold")
        raw = self.read()
        if len(raw) != self.nbytes:
            raise ForeignFileError(f"a storage of {self.nbytes} bytes is declared, but {len(raw)} are there")
        return raw


@dataclass(eq=False)
class TensorRecord:
    """A view of a storage: what `_rebuild_tensor_v2` is called with. It lies within the storage and repeats nothing.

    `scale` is one number that it is to be multiplied by, as weights of 8 bits are.
    """

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    scale: TensorRecord | None = None

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if not isinstance(self.storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ForeignFileError("a tensor is described by something other than a storage and whole numbers")
        if len(self.size) != len(self.stride) or len(self.size) > 8:
            raise ForeignFileError(f"a tensor has {len(self.size)} sizes and {len(self.stride)} strides")
        if self.numel and (self.offset + self.extent > self.storage.numel or self.numel > self.storage.numel):
            raise ForeignFileError(
                f"a tensor of size {list(self.size)} is declared in a storage of {self.storage.numel} numbers"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def extent(self) -> int:
        """Numbers of the storage from the tensor's first to its last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        return self.numel * self.storage.dtype.itemsize

    def set_state(self, m: Machine, state: Any) -> None:
        """Attributes that a tensor carried in Python are dropped."""

    def tensor(self, raw: Raw | None = None) -> Tensor:
        """The numbers, as a contiguous tensor of its own memory; `raw` is the storage, if it was read already."""
        if not self.numel:
            return torch.empty(self.size, dtype=self.storage.dtype)
        dtype = self.storage.dtype
        start, end = self.offset * dtype.itemsize, (self.offset + self.extent) * dtype.itemsize
        raw = self.storage.bytes() if raw is None else raw
        flat = torch.frombuffer(bytearray(memoryview(raw)[start:end]), dtype=dtype)
        tensor = flat.as_strided(self.size, self.stride).contiguous()
        return tensor if self.scale is None else tensor.float() * self.scale.tensor().float()


@dataclass(eq=False)
class DtypeRecord:
    """A numpy dtype of plain numbers."""

    code: str
    order: str = "|"

    def __post_init__(self) -> None:
        if not isinstance(self.code, str) or self.code.lstrip("<>|=") not in _NUMPY_CODES:
            raise ForeignFileError(f"numpy dtype {shown(self.code, 20)!r} is refused: only plain numbers are read")

    def set_state(self, m: Machine, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ForeignFileError("damaged numpy dtype")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        return dtype if self.order == "|" else dtype.newbyteorder(self.order)  # pyright: ignore


_NUMPY_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "?"}


@dataclass(eq=False)
class ArrayRecord:
    """A numpy array of plain numbers."""

    raw: Raw = b""
    dtype: DtypeRecord | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False

    def set_state(self, m: Machine, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ForeignFileError("damaged numpy array")
        shape, dtype, fortran, raw = state[-4:]
        # Pickles of Python 2 hold bytes as latin-1 text.
        raw = _encoded(m, raw) if isinstance(raw, str) else raw
        if not isinstance(raw, (bytes, memoryview)) or not isinstance(dtype, DtypeRecord):
            raise ForeignFileError("damaged numpy array")
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise ForeignFileError("damaged numpy array")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise ForeignFileError(f"a numpy array of shape {list(shape)} is declared, but {len(raw)} bytes are there")
        self.raw, self.dtype, self.shape, self.fortran = raw, dtype, shape, bool(fortran)

    @property
    def nbytes(self) -> int:
        return len(self.raw)

    def array(self) -> np.ndarray[Any, Any]:
        """The numbers, as an array of its own memory in native byte order."""
        if self.dtype is None:
            raise ForeignFileError("damaged numpy array: it has no content")
        flat = np.frombuffer(self.raw, self.dtype.dtype)
        shaped = flat.reshape(self.shape, order="F" if self.fortran else "C")
        return shaped.astype(self.dtype.dtype.newbyteorder("="), copy=True)

    def tensor(self) -> Tensor:
        """The same as a tensor."""
        return torch.from_numpy(self.array())


def _tensor(m: Machine, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> TensorRecord:
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ForeignFileError("a tensor's size is not a tuple")
    if more[2:] and more[2]:
        raise ForeignFileError("a tensor is stored as the negative of itself: save what .resolve_neg() gives")
    return TensorRecord(storage, offset, size, stride)


def _parameter(m: Machine, data: Any, *more: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise ForeignFileError("a parameter holds no tensor")
    return data


def _of_type(m: Machine, function: Any, kind: Any, args: Any, state: Any) -> TensorRecord:
    if not isinstance(function, Name) or function.module != "torch._utils":
        raise ForeignFileError("a tensor is rebuilt by something other than torch._utils")
    return _parameter(m, m.call(function, args))


def _persistent_object(m: Machine, meta: Any) -> Record:
    """EDM's persistent objects: class name and state are kept, the source is hashed and dropped."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise ForeignFileError("damaged persistent object: it has no class name")
    state, source = meta.get("state"), meta.get("module_src")
    if not isinstance(state, dict) or not isinstance(source, str):
        raise ForeignFileError(f"damaged persistent object {meta['class_name']}: it has no state or no source")
    # The same text serves all objects of a file: it is hashed once.
    if id(source) not in m.hashes:
        m.hashes[id(source)] = (source, hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest())
    return Record(meta["class_name"], state, m.hashes[id(source)][1])


def _reconstructed_array(m: Machine, kind: Any, *more: Any) -> ArrayRecord:
    if shown(kind) != "numpy.ndarray":
        raise ForeignFileError(f"numpy arrays of the class {shown(kind)} are refused")
    return ArrayRecord()


def _array_from_buffer(m: Machine, raw: Any, dtype: Any, shape: Any, order: Any) -> ArrayRecord:
    array = ArrayRecord()
    array.set_state(m, (shape, dtype, order == "F", raw))
    return array


def _scalar(m: Machine, dtype: Any, raw: Any) -> Any:
    array = ArrayRecord()
    array.set_state(m, ((), dtype, False, raw))
    return array.array().item()


def _encoded(m: Machine, text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ForeignFileError("the pickle encodes something other than text as latin-1")
    m.budget.spend(len(text) // 64)
    return text.encode("latin-1")


def _no_bytes(m: Machine) -> bytes:
    """How protocols 0 to 2 write `b""`."""
    return b""


def _reconstructed(m: Machine, kind: Any, base: Any, state: Any) -> Any:
    return m.new(kind, (state,))


def _size(m: Machine, sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, (list, tuple)):
        raise ForeignFileError("a torch.Size is not made of a list")
    m.budget.spend(len(sizes))
    return tuple(sizes)


def _text(m: Machine, *args: Any) -> str:
    return " ".join(shown(arg, 100) for arg in args[:2])


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "torch.device": _text,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "numpy.dtype": lambda m, code, *more: DtypeRecord(code),
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    "builtins.bytes": _no_bytes,
    "builtins.set": make_set,
    "builtins.frozenset": make_set,
    **{f"{core}.multiarray._reconstruct": _reconstructed_array for core in ("numpy.core", "numpy._core")},
    **{f"{core}.multiarray.scalar": _scalar for core in ("numpy.core", "numpy._core")},
    **{f"{core}.numeric._frombuffer": _array_from_buffer for core in ("numpy.core", "numpy._core")},
}

ALLOWED = AllowList(
    calls=CALLS,
    mappings=frozenset(
        {
            "collections.OrderedDict",
            "collections.defaultdict",
            "collections.Counter",
            "builtins.dict",
            "dnnlib.EasyDict",
            "dnnlib.util.EasyDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
        }
    ),
    # Classes in public checkpoints. Their objects become records, whose code is never looked for.
    inert=(
        *(name for name in STORAGES if not name.endswith("UntypedStorage")),
        "torch.UntypedStorage",
        "torch.storage.UntypedStorage",
        "torch.float",
        "torch.bfloat16",
        "torch.nn.modules.",
        "torch.nn.parameter.Parameter",
        "torch.Tensor",
        "torch._tensor.Tensor",
        "numpy.ndarray",
        "builtins.int",
        "builtins.float",
        "builtins.str",
        "builtins.list",
        "builtins.object",
        "typing.Any",
        "omegaconf.",
        "pytorch_lightning.",
        "lightning.",
    ),
)
