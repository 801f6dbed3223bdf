"""Scripts called in this process, as their command lines would: starting Python anew takes seconds each time."""

import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


@dataclass(frozen=True)
class Done:
    """What a program left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(script, *overrides):
    """The command line for a process of its own."""
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, overrides)]


def call(script, *overrides):
    """Run `scripts/SCRIPT.py OVERRIDES` to its end."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"scripts/{script}.py", *map(str, overrides)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            importlib.import_module(script).main()
        except SystemExit as end:
            code = end.code
    return Done(code, out.getvalue(), err.getvalue())
