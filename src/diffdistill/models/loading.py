"""Models as files: one safetensors file, with the config that rebuilds the denoiser in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.devices import channels_last
from diffdistill.errors import one_line
from diffdistill.files.remote import hub_hint, local_path
from diffdistill.models.building import NETWORKS, build_denoiser, config_of, resolved_config
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.own.adapter import OwnNetwork
from diffdistill.models.own.registration import UNREGISTERED
from diffdistill.models.storage import DAMAGES, MODEL, load_state, shipped_models, write_model
from diffdistill.registry import resolve


def save_denoiser(
    denoiser: NetworkDenoiser, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write weights and config to one safetensors file, whole or not at all.

    Args:
        denoiser: from `build_denoiser` or `load_denoiser`.
        path: of the file, which ends in .safetensors, or of a folder, in which it is `model.safetensors`.
        provenance: what made these weights, such as command and metrics; by default that of the config.

    Raises:
        ValueError: the denoiser has no config.
    """
    config = config_of(denoiser)
    if provenance is not None:
        config["provenance"] = dict(provenance)
    write_model(path, denoiser, resolved_config(config))


def load_denoiser(
    name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu", like: Denoiser | None = None
) -> Denoiser:
    """Load a denoiser, ready for evaluation.

    Args:
        name_or_path: the name of a shipped model (`shipped_models()` lists them), a file, a folder that holds
            `model.safetensors` or is of diffusers, or that of a run, whose newest average is taken if it is not
            finished; or a name that `files.remote.local_path` fetches, `hf:OWNER/NAME[@REVISION][:FILE]` or a URL.
        device: where to put it.
        like: a denoiser whose network is copied where the file is of a network without a registered name.

    Raises:
        ValueError: there is no such model, or the file is truncated, of another format or another architecture.
    """
    name, (key, path) = os.fspath(name_or_path), find_model(name_or_path)
    # Channels last, because convolutions are faster so, on CPU as on GPU.
    denoiser = (_read_like(path, like) or resolve(READERS[key])(path)).to(device).eval()
    denoiser.source = name if name in shipped_models() else str(path)
    channels_last(denoiser)
    return denoiser


def find_model(name_or_path: str | os.PathLike[str]) -> tuple[str, Path]:
    """How a model is read, an entry of `READERS`, and from which file; arguments and errors as of `load_denoiser`."""
    shipped, name = shipped_models(), os.fspath(name_or_path)
    path = shipped.get(name) or local_path(name)
    if path.is_dir():
        unfinished = (path / "config.yaml").is_file() and not (path / "finished.json").is_file()
        first = ["config.yaml"] if unfinished and any(path.glob("checkpoints/*.json")) else []
        key = next((key for key in (*first, *READERS) if (path / key).is_file()), None)
        if key is None:
            raise ValueError(f"the folder {path} holds no model: expected one of {', '.join(_keys(folder=True))} in it")
        return key, path / key
    if not path.is_file():
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(sorted(shipped)) or '(none shipped)'}, or give the path "
            f"of a file or folder{hub_hint(name)}"
        )
    if path.suffix not in READERS:
        raise ValueError(f"cannot read {path}: models end in {', '.join(_keys(folder=False))}")
    return path.suffix, path


def _read_like(path: Path, like: Denoiser | None) -> NetworkDenoiser | None:
    """What a file of a network without a name holds, in a copy of a network; None for other files."""
    if not isinstance(like, NetworkDenoiser) or not isinstance(like.model, OwnNetwork):
        return None
    config, state = MODEL.read(path)
    if config["network"].get("name") != UNREGISTERED:
        return None
    own = like.model
    network = OwnNetwork(own.bare_network(), num_classes=config["num_classes"], call=own.call, **config["adapter"])
    denoiser = build_denoiser(config, network=network)
    load_state(denoiser, state, source=str(path))
    return denoiser


def _keys(*, folder: bool) -> list[str]:
    return [key for key in READERS if key.startswith(".") != folder]


def read_safetensors(path: Path) -> NetworkDenoiser:
    """Read a file that `save_denoiser` wrote, strictly.

    Raises:
        ValueError: as `load_denoiser`.
    """
    config, state = MODEL.read(path)
    if "network" not in config and config.get("autoencoder") is not None:
        raise ValueError(f"{path} holds an autoencoder, not a denoiser")
    _check_network(config, path)
    try:
        denoiser = build_denoiser(config)
    except DAMAGES as error:
        raise ValueError(f"the config in {path} builds no model: {one_line(error)}") from None
    load_state(denoiser, state, source=str(path))
    return denoiser


def _check_network(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of a network that only the user can build, and say how to."""
    network = config.get("network")
    name = network.get("name") if isinstance(network, dict) else None
    if config.get("adapter") is None or not isinstance(network, dict) or not isinstance(name, str):
        return
    if name == UNREGISTERED:
        raise ValueError(
            f"{path} holds the weights of a network {network.get('kind')!r} that {network.get('reason')}: build it "
            "and load the file by diffdistill.wrap(net, weights=FILE)"
        )
    if name not in NETWORKS:
        raise ValueError(
            f"{path} holds the network {name!r}, which is not registered here: import the module that registers it "
            f"(@diffdistill.register_network({name!r})), or give it to the command as plugins=[MODULE]"
        )


READERS: dict[str, Callable[[Path], Denoiser] | str] = {
    ".safetensors": "diffdistill.interop:read_either",
    "model.safetensors": read_safetensors,
    "config.yaml": "diffdistill.training.weights:read_run",
    "model_index.json": "diffdistill.interop.diffusers.folders:read_folder",
    "config.json": "diffdistill.interop.diffusers.folders:read_network",
    **dict.fromkeys((".pkl", ".pt", ".pth", ".ckpt", ".bin", ".gguf"), "diffdistill.interop:read_denoiser"),
}
"""How to read a model: by the suffix of a file, or by the name of a file that a folder holds.

Each is a function of that file, or the import path of one.
"""


def fingerprint(denoiser: nn.Module) -> str:
    """A short hash of config and weights, for predictors to record which model they belong to.

    It is computed once, and again when a tensor was replaced or written to.
    """
    digest = hashlib.sha256()
    if isinstance(denoiser, Denoiser) and denoiser.config is not None:
        config = {key: value for key, value in config_of(denoiser).items() if key != "provenance"}
        digest.update(json.dumps(config, sort_keys=True).encode())
    state = sorted(denoiser.state_dict().items())
    now = digest.hexdigest(), [(value.dtype, value.data_ptr(), value._version) for _, value in state]
    then, known = _FINGERPRINTS.get(denoiser, (None, ""))
    if now == then:
        return known
    for name, value in state:
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    known = digest.hexdigest()[:16]
    _FINGERPRINTS[denoiser] = now, known
    return known


_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
