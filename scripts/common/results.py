"""How a run begins and ends: weights to begin with, pictures, and a model that says what made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from common.arguments import as_given
from common.configs import plain
from common.typed import typed_command
from diffdistill import load_denoiser
from diffdistill.distributed import rank
from diffdistill.models import save_denoiser
from diffdistill.models.storage import load_state
from diffdistill.training import Run


def provenance(config: DictConfig, run: Run) -> dict[str, Any]:
    """What made a model: the command, its settings, and the last line of the metrics."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    metrics = run.metrics()
    return {
        "command": " ".join([typed_command(), *map(as_given, overrides)]),
        "settings": plain(config),
        "metrics": metrics[-1] if metrics else {},
    }


def initialize(module: nn.Module, init: str | None, load: Callable[[str], nn.Module] = load_denoiser) -> None:
    """Give a model the weights of another of the same architecture, if one is named.

    Raises:
        ValueError: there is no such model, or it has another architecture.
    """
    if init is not None:
        load_state(module, load(init).state_dict(), source=f"init={init}")


def finish(model: Any, run: Run, config: DictConfig, *, save: Callable[..., None] = save_denoiser) -> str:
    """Save the result of a run, mark the run as finished, and return the path of the model."""
    if rank() == 0:
        save(model, run.path / "model.safetensors", provenance=provenance(config, run))
    run.finish(["model.safetensors"], keep=1)  # with which the run can be extended
    return str(run.path / "model.safetensors")
