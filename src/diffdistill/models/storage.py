"""Weights and the config that rebuilds them, as one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffdistill.files.records import FileKind

MODEL = FileKind("model", key="diffdistill", folder="models")
DAMAGES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What the building of a model from a damaged config ends in."""


def write_model(path: str | os.PathLike[str], module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write the state of a module and its config to one file, whole or not at all.

    `path` ends in .safetensors, or is a folder, in which the file is `model.safetensors`.
    """
    path = Path(path)
    MODEL.write(path if path.suffix == ".safetensors" else path / "model.safetensors", config, module.state_dict())


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state` into `module`, strictly, with an error of one line.

    Raises:
        ValueError: `state` belongs to another architecture; `source` names where it comes from.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            raise ValueError(f"{source} holds another architecture: {len(names)} tensors {problem}, first {names[0]}")
    module.load_state_dict(dict(state))


def shipped_models() -> dict[str, Path]:
    """The models that come with the package, by name."""
    return MODEL.shipped()
