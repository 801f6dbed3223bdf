"""What the scripts share: Hydra configs by name, and errors of one line with exit code 2."""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
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
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from checks import check_settings
from diffdistill.acceleration import accelerated
from diffdistill.data import ImageData
from diffdistill.denoiser import Denoiser
from diffdistill.generation import Plan
from diffdistill.models import save_denoiser
from diffdistill.registry import choose
from diffdistill.training import DataError, NonFiniteLossError, Run
from diffdistill.training.distributed import LostProcessError, processes, rank
from usage import check_preset, names_of, usage

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")
TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    DataError,
    LostProcessError,
    NonFiniteLossError,
    torch.OutOfMemoryError,
    HydraException,
    OmegaConfBaseException,
)
SAME_ERROR_SECONDS = 5.0


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
                torch.manual_seed(OmegaConf.select(config, "trainer.seed", default=0))  # for the first weights
                main(config)

        @wraps(main)
        def program() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(usage(Path(CONFIGS), config_name, sys.modules[main.__module__].__doc__ or ""))
                return
            with errors_in_one_line(), hydra_environment():
                check_preset(Path(CONFIGS), config_name, sys.argv[1:])
                hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(task)()

        return program

    return decorate


@contextmanager
def hydra_environment() -> Iterator[None]:
    """Make Hydra pass its own errors on, and jobs that it submits find this file and pass on theirs.

    Later programs see no change.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
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


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line and exit code 2 at an error that the user can mend, and with 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        if TRACEBACK:
            raise
        print(f"interrupted{'; what was submitted goes on' * from_submitit(error)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except USER_ERRORS as error:
        if TRACEBACK:
            raise
        here = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0")
        # torchrun ends the rest once a process has ended: so an error of all is shown by the first, and a cause of its
        # own in one process before what it brings about in the others.
        later = 2 if isinstance(error, LostProcessError) else 1 if here else 0
        time.sleep(later * SAME_ERROR_SECONDS)
        print(f"error{f' in process {here}' if here else ''}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if TRACEBACK or not from_submitit(error):
            raise
        print(f"error: {about_a_job(error)}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def errors_in_the_log() -> Iterator[None]:
    """Show progress and errors in the log of a submitted job, whose exit code then is 2.

    The command that submitted it gets errors too, in a form that travels.
    """
    log = logging.StreamHandler()
    log.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger("diffdistill").addHandler(log)
    logging.getLogger("diffdistill").setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        if isinstance(error, USER_ERRORS) or from_submitit(error):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        atexit.register(os._exit, 2)  # Hydra and submitit end well, having passed the error on
        raise ValueError(one_line(error)) from None


def from_submitit(error: BaseException) -> bool:
    """Whether an error was raised while this command submitted a job or waited for it."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("submitit.") for frame, _ in frames)


def about_a_job(error: Exception) -> str:
    """An error of submitit in one line: that Slurm refused the job, or how it ended, with the last line of its log."""
    if isinstance(error.__cause__, subprocess.CalledProcessError):
        return "the job was not submitted, for the reason above"
    ended, *log = re.split(r"\n-{10,}\n?", str(error))
    return f"{' '.join(ended.split())} {''.join(log[:1]).strip().rpartition(chr(10))[2]}".strip()


class Submission(Callback):
    """Says that a command becomes jobs, and where their logs will be."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before anything is submitted."""
        folder = Path(config.hydra.sweep.dir, ".submitit").resolve()
        print(f"submitting; the log of job N will be {folder}/N/N_0_log.out", flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for a missing preset, with those there are."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        if error.missing_cfg_file.startswith("hydra/launcher/submitit"):
            return 'jobs need hydra-submitit-launcher, which is not installed: pip install -e ".[slurm]"'
        group, _, name = error.missing_cfg_file.partition("/")
        return f"unknown {group} {name!r}: choose one of {', '.join(names_of(Path(CONFIGS, group)))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give {error.full_key}=VALUE"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(lines).replace("\t", ", ") or type(error).__name__


def defaults_of(config_name: str) -> dict[str, Any]:
    """The settings of a script as its file states them."""
    found = OmegaConf.to_container(OmegaConf.load(Path(CONFIGS, f"{config_name}.yaml")))
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


def faster(scheme: Plan, settings: dict[str, Any]) -> Plan:
    """A plan with the switches of a script, and its `precision`."""
    bf16 = choose("precision", settings["precision"], {"fp32": False, "bf16": True})
    return replace(scheme, denoiser=accelerated(scheme.denoiser, **switches(settings)), bf16=bf16)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The config of another script, as its command line would make it."""
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return hydra.compose(config_name, overrides)
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
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
