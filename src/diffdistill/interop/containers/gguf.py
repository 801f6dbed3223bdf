"""Files of GGUF, through the package of that name: weights in blocks of few bits, decoded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffdistill.interop.containers.records import MAX_TENSORS, ForeignFileError
from diffdistill.interop.containers.tensors import Storage, TensorRecord

MAGIC = b"GGUF"
EXTRA = 'pip install "diffdistill[gguf]"'
SHAPES = "comfy.gguf.orig_shape."
"""Begins the entries with shapes of tensors that were stored flat, since their rows do not divide into blocks."""


def read_gguf(path: Path) -> dict[str, TensorRecord]:
    """The tensors of a file, of 32 bits once they are read.

    Raises:
        ImportError: the package is missing.
        ForeignFileError: the file is damaged, or holds a kind of block that the package does not decode.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"files of GGUF need an extra: {EXTRA} ({error})") from None
    try:
        reader = gguf.GGUFReader(path)
        if len(reader.tensors) > MAX_TENSORS:
            raise ForeignFileError(f"the file lists {len(reader.tensors)} tensors")
        return {str(tensor.name): _record(gguf, reader, tensor) for tensor in reader.tensors}
    except ForeignFileError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, OSError, AttributeError) as error:
        raise ForeignFileError(f"damaged file of GGUF: {str(error) or type(error).__name__}") from None


def _record(gguf: Any, reader: Any, tensor: Any) -> TensorRecord:
    size = tuple(int(n) for n in reversed(tensor.shape))
    stated = reader.get_field(f"{SHAPES}{tensor.name}")
    if stated is not None:
        size = tuple(int(stated.parts[i][0]) for i in stated.data)
    numel = math.prod(size)
    if numel != int(tensor.n_elements) or any(n < 0 for n in size):
        raise ForeignFileError(
            f"{str(tensor.name)[:80]} has {int(tensor.n_elements)} numbers, not those of {list(size)}"
        )
    stride = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    return TensorRecord(Storage(torch.float32, numel, _decoded(gguf, tensor)), 0, size, stride)


def _decoded(gguf: Any, tensor: Any) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (ValueError, NotImplementedError, TypeError, LookupError) as error:
            raise ForeignFileError(f"{str(tensor.name)[:80]} cannot be decoded: {error}") from None
        return values.astype("float32").tobytes()

    return read
