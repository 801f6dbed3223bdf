"""Weights and the config that rebuilds them, as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.atomic import replacing

FORMAT = 1
METADATA_KEY = "diffdistill"


def write_model(path: str | os.PathLike[str], module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write the state of a module and its config to one file, whole or not at all.

    `path` ends in .safetensors, or is a folder, in which the file is `model.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / "model.safetensors"
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={METADATA_KEY: json.dumps(config)})


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the state in a file.

    Raises:
        ValueError: the file is truncated, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} holds tensors, but no config of a diffdistill model")
    try:
        config = json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"the config in {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        version = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{path} has model format {version}: this version reads format {FORMAT}")
    return config, state


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
    assets = Path(str(resources.files("diffdistill"))) / "assets" / "models"
    return {path.stem: path for path in sorted(assets.glob("*.safetensors"))}
