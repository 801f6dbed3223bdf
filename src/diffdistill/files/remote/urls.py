"""Single files by URL: resumable, whole or not at all, with the hash pinned on first use."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from tqdm import tqdm

from diffdistill.files.hashes import sha256 as sha256_of
from diffdistill.files.remote.cache import FetchError, Pins, cache_folder, check_consent, check_space

CHUNK = 2**20
TIMEOUT_SECONDS = 30.0
TRIES = 5
"""How often a transfer that breaks in the middle is taken up again where it broke."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def fetch_url(url: str, *, sha256: str | None = None) -> Path:
    """The file of a URL in the cache, fetched if it is not there yet.

    Raises:
        FetchError: as `local_path`.
    """
    check_url(url)
    folder = cache_folder() / "urls" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (unquote(urlsplit(url).path).rpartition("/")[2] or "file")
    pinned = Pins().get(url).get("sha256")
    expected = sha256 or pinned
    if path.is_file():
        if sha256 is not None and sha256 != pinned:
            check_hash(url, pinned or sha256_of(path), sha256)
        return path
    size = _size(url)
    check_consent(url, f"from {urlsplit(url).hostname}", size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not path.is_file():  # another process may have been faster
                _fetch(url, path, size, expected)
    except OSError as error:
        raise FetchError(f"could not fetch {url}: {error.strerror or error}") from error
    return path


def check_url(url: str) -> None:
    """Raise `FetchError` for a URL without encryption, unless it is on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS):
        raise FetchError(f"{url} is not fetched: give an address that begins with https://")


def check_hash(name: str, found: str, expected: str) -> None:
    """Raise `FetchError` if a hash is not what it must be."""
    if found != expected.lower():
        raise FetchError(f"{name} has the SHA-256 {found}, not {expected}: it is not what was asked for")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to addresses that `check_url` lets pass."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)


def _open(url: str, method: str = "GET", **headers: str) -> Any:
    headers = {"User-Agent": "diffdistill", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        return _OPENER.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and "Range" in headers:
            return error
        if error.code in (405, 501) and method == "HEAD":
            return _open(url, **headers)
        reason = "no such file" if error.code == 404 else f"the server answers {error.code} {error.reason}"
        raise FetchError(f"could not fetch {url}: {reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchError(f"could not fetch {url}: no connection ({reason})") from None


def _size(url: str) -> int | None:
    with _open(url, "HEAD") as answer:
        length = answer.headers.get("Content-Length")
        return int(length) if length and length.isdigit() else None


def _fetch(url: str, path: Path, size: int | None, expected: str | None) -> None:
    """Fetch to a partial file, on from where an earlier transfer of the same version broke, and put it in place."""
    partial, version = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.version")
    check_space(path.parent, None if size is None else size - _held(partial), url)
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, initial=_held(partial)) as bar:
        for last in range(TRIES - 1, -1, -1):
            try:
                total = _transfer(url, partial, version, bar)
            except (OSError, http.client.HTTPException) as error:
                if last == 0:
                    raise FetchError(f"could not fetch {url}: {error}; the same command goes on from there") from None
                continue
            if total is None or _held(partial) == total:
                break
        else:
            raise FetchError(f"could not fetch {url}: the transfer broke {TRIES} times; the same command goes on")
    found = sha256_of(partial)
    try:
        if expected is not None:
            check_hash(url, found, expected)
    except FetchError:
        partial.unlink()
        raise
    finally:
        version.unlink(missing_ok=True)
    Pins().set(url, {"sha256": found, "size": _held(partial)})
    os.replace(partial, path)


def _transfer(url: str, partial: Path, version: Path, bar: Any) -> int | None:
    """Take up or begin the transfer; returns how large the file must be in the end, if the server says so."""
    held = _held(partial)
    same = version.read_text() if held and version.exists() else ""
    ranged = {"Range": f"bytes={held}-", "If-Range": same} if same else {}
    with _open(url, **ranged) as answer:
        if answer.status == 416:  # all of it is here, or the file has become shorter
            partial.unlink(missing_ok=True)
            return -1
        going_on = answer.status == 206
        length = answer.headers.get("Content-Length")
        total = None if length is None else int(length) + held * going_on
        version.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        bar.n = held * going_on
        with open(partial, "ab" if going_on else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total


def _held(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0
