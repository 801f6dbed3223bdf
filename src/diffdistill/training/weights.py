"""The weights of a run that is not finished, as a model: the average in its newest checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from diffdistill.models.building import build_denoiser, config_of
from diffdistill.models.network import NetworkDenoiser
from diffdistill.training import sharding
from diffdistill.training.checkpoints import CheckpointError, Checkpoints

logger = logging.getLogger(__name__)


def description(module: nn.Module) -> dict[str, Any] | None:
    """The config that rebuilds what is trained, for its checkpoints; None where that is no denoiser of a config."""
    known = isinstance(module, NetworkDenoiser) and module.config is not None
    return config_of(module) if known else None  # pyright: ignore[reportArgumentType]


def read_run(config: Path) -> NetworkDenoiser:
    """The denoiser in the newest checkpoint of a run, averaged where there is an average.

    Args:
        config: `config.yaml` in the folder of the run.

    Raises:
        ValueError: the run has no checkpoint yet, or one of something else than a whole denoiser.
    """
    run = config.parent
    if (run / "stages").is_dir():
        stages = sorted(str(stage) for stage in (run / "stages").iterdir() if not stage.name.startswith("."))
        raise ValueError(f"{run} is a run of several stages: give one of {', '.join(stages) or '(none yet)'}")
    return _read(Checkpoints(run / "checkpoints"))


def read_checkpoint(path: Path) -> NetworkDenoiser:
    """The same of one checkpoint of a run, by its file."""
    return _read(Checkpoints(path.parent), update=int(path.name.partition(".")[0]))


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, beside its record."""
    stem = path.name.partition(".")[0]
    return stem.isdigit() and path.suffix == ".pt" and path.with_name(f"{stem}.json").is_file()


def _read(checkpoints: Checkpoints, update: int | None = None) -> NetworkDenoiser:
    found = checkpoints.load(update)
    if found is None:
        raise ValueError(f"the run {checkpoints.folder.parent} has neither a model nor a checkpoint yet")
    config = found.state.get("model")
    if config is None:
        raise ValueError(f"the checkpoint {found.path} holds no denoiser that can be rebuilt from it")
    denoiser, average = build_denoiser(config), found.state["average"]
    try:
        sharding.load_module(denoiser, average or found.state["trained"])
    except ValueError as error:
        if (config["network"] or {}).get("lora"):
            raise ValueError(f"the checkpoint {found.path} holds adapters alone: finish the run first") from None
        raise CheckpointError(f"the checkpoint {found.path} does not fit its own config: {error}") from None
    kind = "average" if average else "weights"
    logger.info("%s: the %s after %d updates", found.path, kind, found.update)
    return denoiser
