"""From a function of a config to a command line program."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.arguments import for_hydra, preset_folders
from common.checks import check_settings
from common.configs import CONFIGS, given_by, let_given_win, names_in, plain
from common.errors import errors_in_one_line
from common.jobs import errors_in_the_log
from common.notes import notes_on_stderr
from common.plugins import import_plugins
from common.typed import VARIABLE, as_typed, typed_command
from common.usage import check_preset, usage
from diffdistill.distributed import processes, rank
from diffdistill.files.remote import consent
from diffdistill.settings import Integer, mismatch


def command(
    config_name: str, *, by_place: Callable[[list[str]], list[str]] = list
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(config)` a command line program on `configs/<config_name>.yaml`.

    What a user can mend ends in one line on stderr and exit code 2; `HYDRA_FULL_ERROR=1` shows the traceback.
    Under `torchrun` the processes join before `main` runs, and process 0 alone prints.

    Args:
        config_name: names the file of the settings.
        by_place: maps arguments that are given by their place to settings.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @wraps(main)
        def task(config: DictConfig) -> None:
            submitted = "SUBMITIT_EXECUTOR" in os.environ  # whose log shows notes too
            ends, notes = (errors_in_the_log, nullcontext) if submitted else (errors_in_one_line, notes_on_stderr)
            with ends(), processes(), notes(), quiet_unless_first(), short_warnings():
                typed = HydraConfig.get().overrides.task
                let_given_win(config, given_by(typed))
                settings = plain(config)
                import_plugins(settings.get("plugins", []))
                check_settings(settings, config_name, given=names_in(typed))
                seed = OmegaConf.select(config, "trainer.seed", default=0)
                torch.manual_seed(
                    0 if mismatch(seed, Integer) else seed
                )  # for first weights; the trainer refuses others
                with consent() if settings.get("fetch") else nullcontext():
                    main(config)

        @wraps(main)
        def program() -> None:
            with errors_in_one_line(), environment():
                folders = preset_folders(sys.argv[1:])
                if {"--help", "-h"} & set(sys.argv[1:]):
                    print(as_typed(usage(folders, config_name, sys.modules[main.__module__].__doc__ or "")))
                    return
                check_preset(folders, config_name, sys.argv[1:])
                sys.argv[1:] = for_hydra(by_place(sys.argv[1:]), config_name)
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()

        return program

    return decorate


@contextmanager
def environment() -> Iterator[None]:
    """Make Hydra pass its own errors on, and jobs that it submits find these files and know what was typed.

    Later programs see no change.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"HYDRA_FULL_ERROR": "1", "PYTHONPATH": path, VARIABLE: typed_command()}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextmanager
def short_warnings() -> Iterator[None]:
    """Show a warning in one line, without the place in the code that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def quiet_unless_first() -> AbstractContextManager[Any]:
    """What all processes print is shown once."""
    return redirect_stdout(io.StringIO()) if rank() else nullcontext()
