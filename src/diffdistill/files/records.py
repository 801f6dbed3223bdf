"""Tensors with a record of what they are, as one safetensors file: the form of all that the package saves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdistill.files.atomic import replacing


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors on the CPU as a safetensors file, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError  # here, since solvers shall load without it
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {os.fspath(path)} ({error})") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as tied weights do: the format refuses that."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def shipped_files(folder: str) -> dict[str, Path]:
    """The files of a folder of the package's assets, by name."""
    place = Path(str(resources.files("diffdistill"))) / "assets" / folder
    return {path.stem: path for path in sorted(place.glob("*.safetensors"))}


@dataclass(frozen=True)
class FileKind:
    """A kind of safetensors file that holds tensors and a record.

    Attributes:
        name: what it holds, for messages.
        key: the entry of the metadata that is the record, as JSON.
        folder: of the shipped files, in `assets`.
        format: version of the record, in its entry `format`.
    """

    name: str
    key: str
    folder: str
    format: int = 1

    def write(self, path: str | os.PathLike[str], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a file, whole or not at all."""
        tensors = _apart({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        save_tensors(tensors, path, {self.key: json.dumps({"format": self.format, **record})})

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record and the tensors of a file.

        Raises:
            ValueError: the file is truncated, of another kind or of another version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        if self.key not in metadata:
            raise ValueError(f"{path} holds tensors, but no {self.name} of diffdistill")
        try:
            record = json.loads(metadata[self.key])
            version = record["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"the record in {path} cannot be read: the file is damaged") from None
        if version != self.format:
            raise ValueError(f"{path} has {self.name} format {version}: this version reads format {self.format}")
        return record, tensors

    def shipped(self) -> dict[str, Path]:
        """The files that come with the package, by name."""
        return shipped_files(self.folder)

    def find(self, name_or_path: str | os.PathLike[str]) -> Path:
        """The file of a shipped name, at a path, or fetched by hub id or URL.

        Raises:
            ValueError: neither is there.
        """
        shipped = self.shipped()
        from diffdistill.files.remote import hub_hint, local_path

        name = os.fspath(name_or_path)
        path = shipped.get(name) or local_path(name)
        if not path.is_file():
            names = ", ".join(shipped) or "(none shipped)"
            raise ValueError(f"unknown {self.name} {name!r}: choose one of {names}, or give a file{hub_hint(name)}")
        return path
