"""What a table misses, made: files are fetched, and what is trained is trained by the presets' own commands."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdistill.files.atomic import replacing
from diffdistill.files.remote import FetchError, local_path
from diffdistill.tables.planning import Work, work_for
from diffdistill.tables.reproduction import Failure
from diffdistill.tables.tables import Table

logger = logging.getLogger("diffdistill")


def make_missing(table: Table) -> list[Failure]:
    """Fetch and make what a table misses; what fails does not stop the rest, and is returned.

    A command continues what an interrupted one began, as every command of the package does. Files are fetched with
    consent only, see `files.remote`.
    """
    failures = []
    for work in work_for(table):
        logger.info("%s", work)
        failure = _DOING[work.kind](work)
        if failure is not None:
            failures.append(Failure(", ".join(need.path for need in work.needs), failure))
            logger.warning("%s", failures[-1])
    return failures


def _fetch(work: Work) -> str | None:
    """Fetch to the cache, and lay the file where the table expects it; returns what went wrong."""
    for need in work.needs:
        try:
            found = local_path(work.how, sha256=need.sha256)
        except FetchError as error:
            return str(error)
        with replacing(need.path) as temporary:
            Path(temporary).unlink(missing_ok=True)
            try:
                os.link(found.resolve(), temporary)
            except OSError:  # another disk
                shutil.copyfile(found, temporary)
    return None


def _make(work: Work) -> str | None:
    """Run the command in a process of its own; returns its last line if it fails."""
    done = subprocess.run(command_line(work.how), stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        absent = next((need.path for need in work.needs if need.missing), None)
        return None if absent is None else f"the command ended, and made no {absent}"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return said[-1].strip() if said else f"the command ended with {done.returncode}"


def _by_hand(work: Work) -> str | None:
    return work.how


_DOING = {"fetch": _fetch, "make": _make, "by hand": _by_hand}


def command_line(command: str) -> Sequence[str]:
    """A command of the package as arguments for a process of the same Python; no shell reads it."""
    return [sys.executable, "-m", *shlex.split(command)]
