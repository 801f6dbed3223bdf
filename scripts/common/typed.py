"""What the user typed: the command, for messages, help and provenance."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from common.configs import CONFIGS

VARIABLE = "DIFFDISTILL_COMMAND"
"""Where a job that was submitted finds what was typed."""


def typed_command() -> str:
    """The command without its settings, such as `diffdistill sample` or `python scripts/sample.py`."""
    given = sys.argv[0]
    return os.environ.get(VARIABLE) or (f"python scripts/{Path(given).name}" if given.endswith(".py") else given)


def as_typed(text: str) -> str:
    """`text` with its commands `diffdistill NAME` in the form in which the present one was typed."""
    program = typed_command().rpartition(" ")[0]
    names = {path.stem.replace("_", "-"): path.stem for path in CONFIGS.glob("*.yaml")}

    def form(match: re.Match[str]) -> str:
        return f"python scripts/{names[match[1]]}.py" if program == "python" else f"{program} {match[1]}"

    return re.sub(rf"\bdiffdistill ({'|'.join(names)})\b", form, text)
