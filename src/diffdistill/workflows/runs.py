"""What the workflows have in common: a folder, settings of the trainer, and a model that says what made it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffdistill.data import Data, as_data, check_data, load_data
from diffdistill.data.given import GivenTensors
from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.distributed import from_main, rank
from diffdistill.models import NetworkDenoiser, fingerprint, load_denoiser, save_denoiser
from diffdistill.models.storage import load_state
from diffdistill.training import Run

TRAINER: dict[str, Any] = {
    "updates": 5000,
    "batch_size": 128,
    "learning_rate": 3e-4,
    "warmup": 100,
    "decay": "linear",
    "clip": 1.0,
    "ema_half_life": 20_000,
}
"""Settings of the trainer that a call does not say. They suit a small model; a large one wants more updates."""
MODEL_FILE = "model.safetensors"
Path_ = str | os.PathLike[str]


def opened_model(model: Denoiser | Path_, *, device: str = "cpu") -> Denoiser:
    """A model as it is, or loaded by its name or path."""
    if isinstance(model, Denoiser):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load_denoiser(model, device=device_of(device))
    raise TypeError(
        f"a model is a denoiser, or the name or path of one, not {type(model).__name__}: make a network a denoiser by "
        "diffdistill.wrap"
    )


def opened_data(data: Any, model: Denoiser) -> Data:
    """Data in any form that `as_data` takes, or options of `load_data`, checked against a model."""
    if isinstance(data, Mapping) and "name" in data:
        opened = load_data(**data)
    else:
        opened = as_data(data, shape=model.data_shape if model.codec is None else None)
    check_data(opened, model)
    return opened


@contextmanager
def opened_run(out: Path_ | Run | None, record: Mapping[str, Any], *, accept_changes: bool = False) -> Iterator[Run]:
    """A run as it is, that in a folder, or one that lasts as long as the block."""
    if isinstance(out, Run):
        yield out
    elif out is not None:
        yield Run(out, record, accept_changes=accept_changes)
    else:
        with tempfile.TemporaryDirectory(prefix="diffdistill-") as folder:
            yield Run(from_main(folder), record)


def recorded(workflow: str, **arguments: Any) -> dict[str, Any]:
    """What a run keeps as its configuration: the arguments of a call, models and data by what they hold."""
    return {"workflow": workflow, **{name: _plain(value) for name, value in arguments.items()}}


def _plain(value: Any) -> Any:
    """An argument as a value that a file holds, such that the same call has the same one."""
    if isinstance(value, Denoiser):
        return fingerprint(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, GivenTensors):
        return {"shape": [len(value), *value.shape], "digest": _digest(value.tensors())}
    if hasattr(value, "shape") and hasattr(value, "__len__"):
        return {"shape": [len(value), *value.shape], "num_classes": getattr(value, "num_classes", 0)}
    return value


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance_of(record: Mapping[str, Any]) -> Callable[[Run], dict[str, Any]]:
    """What made a model: the function, its arguments, and the last line of the metrics."""

    def of(run: Run) -> dict[str, Any]:
        metrics, settings = run.metrics(), dict(record)
        command = f"diffdistill.{settings.pop('workflow')}"
        return {"command": command, "settings": settings, "metrics": metrics[-1] if metrics else {}}

    return of


def finished_model(run: Run, like: Denoiser) -> Denoiser:
    """The model of a finished run, on the device of another."""
    return load_denoiser(run.path / MODEL_FILE, device=device_of(like), like=like)


def initialize(model: NetworkDenoiser, init: Denoiser | Path_ | None) -> None:
    """Give a model the weights of another of the same architecture, if there is one.

    Raises:
        ValueError: it has another architecture.
    """
    if init is not None:
        source = opened_model(init)
        load_state(model, source.state_dict(), source=f"init={source.source or type(source).__name__}")


def finish(model: Any, run: Run, provenance: Mapping[str, Any]) -> None:
    """Save the result of a run, and mark the run as finished."""
    if rank() == 0:
        assert isinstance(model, NetworkDenoiser)
        save_denoiser(model, run.path / MODEL_FILE, provenance=provenance)
    run.finish([MODEL_FILE], keep=1)  # a checkpoint, with which the run can be extended
