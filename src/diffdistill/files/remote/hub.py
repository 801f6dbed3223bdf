"""Repositories of the Hugging Face hub, through `huggingface_hub`: of each only what is read, in a pinned commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffdistill.files.hashes import sha256 as sha256_of
from diffdistill.files.remote.cache import FetchError, Pins, check_consent, check_space
from diffdistill.files.remote.urls import check_hash

PATTERN = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:@]+))?")
INDEX = "model_index.json"
VARIANT = "DIFFDISTILL_VARIANT"
"""The variant of the weights to fetch, such as fp16, of a pipeline that has several."""
WEIGHTS = (".safetensors", ".bin")
"""Weights of the parts of a pipeline, what is preferred first."""
SINGLE_FILES = (".safetensors", ".pkl", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
"""What a repository may hold as one file that is read by itself."""
SMALL_FILES = (".json", ".txt", ".model")
"""Configs and tokenizers beside the weights."""


@dataclass(frozen=True)
class HubName:
    """`hf:OWNER/NAME[@REVISION][:FILE]`, taken apart."""

    text: str
    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Take a name apart.

        Raises:
            FetchError: it is none.
        """
        match = PATTERN.fullmatch(text)
        if match is None or any(part in ("..", "") for part in (match["file"] or "x").split("/")):
            raise FetchError(f"{text!r} is no name of the hub: write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or ...:FILE")
        return cls(text, match["repo"], match["revision"], match["file"])


def fetch_from_hub(name: HubName, *, sha256: str | None = None) -> Path:
    """The file, or the folder, of a name of the hub, fetched if it is not there yet.

    Raises:
        FetchError, ImportError: as `local_path`.
    """
    hub = _library()
    pins, key = Pins(), f"{os.environ.get('HF_ENDPOINT', '')} {name.text} {os.environ.get(VARIANT, '')}".strip()
    pin = pins.get(key)
    folder = _cached(hub, name, pin)
    if folder is None:
        info = _ask(hub, name, pin.get("commit"))
        sizes = {str(file.rfilename): file for file in info.siblings or []}
        files = chosen_files(name, list(sizes), variant=os.environ.get(VARIANT))
        total = sum(sizes[file].size or 0 for file in files)
        count = f"{len(files)} file{'s' * (len(files) > 1)}"
        check_consent(name.text, f"{count} from {hub.constants.ENDPOINT}/{name.repo}", total)
        cache = Path(hub.constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_space(cache, total, name.text)
        folder = Path(_call(hub, name, hub.snapshot_download, name.repo, revision=info.sha, allow_patterns=files))
        _verify(name, folder, {file: sizes[file] for file in files})
        pins.set(key, {"commit": info.sha, "files": files})
    path = folder if name.file is None and len(pins.get(key)["files"]) > 1 else folder / pins.get(key)["files"][0]
    if sha256 is not None and path.is_file():
        check_hash(name.text, sha256_of(path), sha256)
    return path


def chosen_files(name: HubName, files: Sequence[str], *, variant: str | None = None) -> list[str]:
    """Of the files of a repository those that are read.

    That is the file that is named; or, of a pipeline, configs, tokenizers and one form of the weights of each part; or
    the one file that is a model by itself.

    Raises:
        FetchError: there is no such file, or none that is read, or several, of which one must be named.
    """
    if name.file is not None:
        if name.file not in files:
            near = ", ".join(sorted(file for file in files if file.endswith(SINGLE_FILES))[:8]) or "none that is read"
            raise FetchError(f"{name.repo} has no file {name.file!r}: it has {near}")
        return [name.file]
    if INDEX in files:
        return [INDEX, *_pipeline_files([file for file in files if "/" in file], variant)]
    single = [file for file in files if "/" not in file and file.endswith(SINGLE_FILES)]
    single = [file for file in single if file == "model.safetensors"] or single
    if len(single) == 1:
        return single
    if not single:
        raise FetchError(f"{name.repo} holds no model that is read: it has {', '.join(files[:8]) or 'no files'}")
    raise FetchError(
        f"{name.repo} holds several models: say which, as hf:{name.repo}:{single[0]} (of {', '.join(single)})"
    )


def _pipeline_files(files: Sequence[str], variant: str | None) -> list[str]:
    parts: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if len(path.parts) == 2:
            parts.setdefault(path.parts[0], []).append(file)
    found = []
    for held in parts.values():
        found += [file for file in held if file.endswith(SMALL_FILES) and not file.endswith(".index.json")]
        forms = [
            [file for file in held if file.endswith(suffix) and _variant(file) == want]
            for want in dict.fromkeys((variant, None, "fp16"))
            for suffix in WEIGHTS
        ]
        weights = next((form for form in forms if form), [])
        stems = {PurePosixPath(file).name.split("-00")[0].split(".")[0] for file in weights}
        found += weights + [
            f for f in held if f.endswith(".index.json") and PurePosixPath(f).name.split(".")[0] in stems
        ]
    return sorted(found)


def _variant(file: str) -> str | None:
    """The variant in a file's name, such as fp16 in `model.fp16.safetensors`, or None."""
    middle = PurePosixPath(file).name.split(".")[1:-1]
    return middle[0].partition("-0")[0] if middle else None


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ImportError(
            'names of the hub need huggingface_hub, which is not installed: pip install "diffdistill[hub]"'
        ) from None
    return huggingface_hub


def _cached(hub: Any, name: HubName, pin: Mapping[str, Any]) -> Path | None:
    """The folder in the cache of the hub that holds all files of a pin."""
    if not pin:
        return None
    try:
        found = [hub.try_to_load_from_cache(name.repo, file, revision=pin["commit"]) for file in pin["files"]]
    except ValueError:
        return None
    if not all(isinstance(path, str) and Path(path).is_file() for path in found):
        return None
    return Path(found[0]).parents[len(PurePosixPath(pin["files"][0]).parts) - 1]


def _ask(hub: Any, name: HubName, commit: str | None) -> Any:
    if hub.constants.HF_HUB_OFFLINE:
        raise FetchError(f"{name.text} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it")
    revision = commit or name.revision
    return _call(hub, name, hub.HfApi().model_info, name.repo, revision=revision, files_metadata=True)


def _call(hub: Any, name: HubName, function: Any, *args: Any, **options: Any) -> Any:
    """Call the library; its errors become lines of ours."""
    errors = hub.errors
    try:
        return function(*args, **options)
    except errors.GatedRepoError:
        raise FetchError(f"{name.repo} needs a token of someone who accepted its terms: set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise FetchError(
            f"the hub has no repository {name.repo!r}, or only with a token: check it, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise FetchError(f"{name.repo} has no revision {name.revision!r}") from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise FetchError(f"could not fetch {name.text}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # the library's transport raises errors of its own, which differ between its versions
        if type(error).__module__.partition(".")[0] not in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
            "urllib3",
        ):
            raise
        raise FetchError(f"could not fetch {name.text}: no connection ({' '.join(str(error).split())[:200]})") from None


def _verify(name: HubName, folder: Path, files: Mapping[str, Any]) -> None:
    """Compare sizes and hashes with those that the hub states; what differs is removed.

    Raises:
        FetchError: a file differs.
    """
    for file, stated in files.items():
        path, lfs = folder / file, stated.lfs
        expected = None if lfs is None else getattr(lfs, "sha256", None)
        wrong = stated.size is not None and path.stat().st_size != stated.size
        if wrong or (expected is not None and sha256_of(path) != expected):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise FetchError(f"{name.repo}/{file} came damaged: its hash is not the one that the hub states")
