"""Files by hub id or URL: fetched once, with consent, kept in a cache, and never executed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffdistill.files.remote.cache import FetchError, consent
from diffdistill.files.remote.hub import HubName, fetch_from_hub
from diffdistill.files.remote.urls import fetch_url

__all__ = ["FetchError", "consent", "hub_hint", "is_remote", "local_path"]


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name stands for something elsewhere: `hf:OWNER/NAME[@REVISION][:FILE]`, or a URL."""
    return os.fspath(name).startswith(("hf:", "https://", "http://"))


def local_path(name: str | os.PathLike[str], *, sha256: str | None = None) -> Path:
    """Where on this machine the file or folder of a name lies; what is elsewhere is fetched first.

    A repository of the hub is given as `hf:OWNER/NAME`, with `@REVISION` and `:FILE` where they are needed. What was
    fetched once is found again without a network, in the commit and with the hash that it had then.

    Args:
        name: a path, which is returned as it is, a hub id, or a URL.
        sha256: what the hash of a single file must be; by default what it was when it was first fetched.

    Raises:
        FetchError: there is no consent to fetch it (see `consent`), no network, no space, no such repository or file,
            a token is needed, or the hash differs; a `ValueError`.
        ImportError: `huggingface_hub` is needed and not installed.
    """
    text = os.fspath(name)
    if text.startswith("hf:"):
        return fetch_from_hub(HubName.parse(text), sha256=sha256)
    return fetch_url(text, sha256=sha256) if is_remote(text) else Path(name)


def hub_hint(name: str) -> str:
    """The end of a message about an unknown name: how a repository of the hub is written, where it looks like one."""
    return f"; a repository of the hub is hf:{name}" if re.fullmatch(r"[\w-]+/[\w.-]+", name) else ""
