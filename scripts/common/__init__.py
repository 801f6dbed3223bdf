"""What the scripts share: Hydra configs by name, settings as plain values, and how a run ends."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.checks import check_settings, is_integer
from common.errors import CONFIGS, errors_in_one_line
from common.jobs import errors_in_the_log
from common.usage import check_preset, usage
from diffdistill.data import ImageData
from diffdistill.denoiser import Denoiser
from diffdistill.distributed import processes, rank
from diffdistill.models import save_denoiser
from diffdistill.models.acceleration import accelerated
from diffdistill.sampling.plans import Plan, in_bf16
from diffdistill.training import Run

warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(config)` a command line program on `configs/<config_name>.yaml`.

    What a user can mend ends in one line on stderr and exit code 2; `HYDRA_FULL_ERROR=1` shows the traceback.
    Under `torchrun` the processes join before `main` runs, and process 0 alone prints.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @wraps(main)
        def task(config: DictConfig) -> None:
            ends = errors_in_the_log if "SUBMITIT_EXECUTOR" in os.environ else errors_in_one_line
            with ends(), processes(), quiet_unless_first():
                check_settings(plain(config), defaults_of(config_name))
                seed = OmegaConf.select(config, "trainer.seed", default=0)
                torch.manual_seed(seed if is_integer(seed) else 0)  # for the first weights; the trainer refuses others
                main(config)

        @wraps(main)
        def program() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(usage(CONFIGS, config_name, sys.modules[main.__module__].__doc__ or ""))
                return
            with errors_in_one_line(), hydra_environment():
                check_preset(CONFIGS, config_name, sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()

        return program

    return decorate


@contextmanager
def hydra_environment() -> Iterator[None]:
    """Make Hydra pass its own errors on, and jobs that it submits find this file and pass on theirs.

    Later programs see no change.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"HYDRA_FULL_ERROR": "1", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def quiet_unless_first() -> AbstractContextManager[Any]:
    """What all processes print is shown once."""
    return redirect_stdout(io.StringIO()) if rank() else nullcontext()


def defaults_of(config_name: str) -> dict[str, Any]:
    """The settings of a script as its file states them."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and numbers."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def switches(settings: dict[str, Any]) -> dict[str, bool]:
    """The settings `channels_last`, `compile` and `cuda_graph` of a script."""
    return {name: settings[name] for name in ("channels_last", "compile", "cuda_graph")}


def faster(plan: Plan, settings: dict[str, Any]) -> Plan:
    """A plan with the switches of a script, and its `precision`."""
    bf16 = in_bf16(settings["precision"], plan.device)
    return replace(plan, denoiser=accelerated(plan.denoiser, **switches(settings)), bf16=bf16)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The config of another script, as its command line would make it."""
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def provenance(config: DictConfig, run: Run) -> dict[str, Any]:
    """What made a model: the command, its settings, and the last line of the metrics."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    command = " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *overrides])
    metrics = run.metrics()
    return {"command": command, "settings": plain(config), "metrics": metrics[-1] if metrics else {}}


def finish(model: Any, run: Run, config: DictConfig, *, save: Callable[..., None] = save_denoiser) -> str:
    """Save the result of a run, mark the run as finished, and return the path of the model."""
    if rank() == 0:
        save(model, run.path / "model.safetensors", provenance=provenance(config, run))
    run.finish(["model.safetensors"])
    return str(run.path / "model.safetensors")


def check_data(data: ImageData, teacher: Denoiser) -> None:
    """Refuse images that are not the teacher's."""
    if tuple(data.shape) != tuple(teacher.data_shape) or data.num_classes < teacher.num_classes:
        raise ValueError(
            f"the data has images {list(data.shape)} of {data.num_classes} classes, "
            f"but the teacher takes {list(teacher.data_shape)} of {teacher.num_classes}"
        )
