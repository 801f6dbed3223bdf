"""Modules of the user's own, which register networks, data sets, solvers and measures: `plugins=[my.module]`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]


def import_plugins(names: Any) -> None:
    """Import modules that the command line or a preset names; those of the working directory are found, too.

    Raises:
        ValueError: not a list of module names, or a module that is not there or cannot be imported; its own error is
            part of the message.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"plugins must be a list of modules, such as plugins=[my.module], but is {names!r}")
    here = os.getcwd()
    if names and here not in sys.path:
        sys.path.append(here)  # last: a file there must not take the place of an installed package
    for name in names:
        _import_plugin(name)


def _import_plugin(name: str) -> ModuleType:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise ValueError(f"plugins: {name!r} is no name of a module, such as my.module for my/module.py")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (error.name == name or name.startswith(f"{error.name}.")):
            raise ValueError(f"plugins: there is no module {name!r} in {os.getcwd()}, nor is it installed") from None
        raise _failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error
    if Path(getattr(module, "__file__", None) or "").is_relative_to(SCRIPTS):
        raise ValueError(f"plugins: the name {name!r} is that of a command: give the file of the plugin another name")
    return module


def _failed(name: str, error: BaseException) -> ValueError:
    """The error of a module in one line, with the place in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f" ({Path(frame.filename).name}, line {frame.lineno})" if not frame.filename.startswith("<") else ""
    said = " ".join(str(error).split())
    return ValueError(f"plugins: {name} cannot be imported: {type(error).__name__}{f': {said}' * bool(said)}{place}")
