"""Captions of images: by the images' names, or one a line in their natural order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffdistill.files.contents import files_within


def read_captions(path: str | Path, count: int, names: Sequence[str] | None = None) -> list[str]:
    """The captions of images.

    Args:
        path: a folder of texts, `cat.txt` for `cat.png`; a `.json` of `{"cat.png": "a cat"}`; a text file of lines
            `cat.png<TAB>a cat`; or one with a caption a line, in the natural order of the images (2.png before 10.png).
        count: number of images.
        names: of the images, if they have any.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a number of captions that is not that of the images, or an image without one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no captions at {str(path)!r}")
    if path.is_dir():
        texts = [file for file in files_within(path) if file.suffix == ".txt"]
        return _paired({str(file.relative_to(path)): _text(file).strip() for file in texts}, names, path)
    if path.suffix == ".json":
        try:
            given = json.loads(_text(path))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
            raise ValueError(f'{str(path)!r} is not a JSON of {{"image": "caption"}}')
        return _paired(given, names, path)
    # Not `splitlines`, which also parts at U+2028 and other characters that stand within captions.
    lines = [line.removesuffix("\r") for line in _text(path).removesuffix("\n").split("\n")]
    pairs = [line.partition("\t") for line in lines]
    if names is not None and all(tab and _stem(name) in {_stem(n) for n in names} for name, tab, _ in pairs):
        return _paired({name: caption for name, _, caption in pairs}, names, path)
    if len(lines) != count:
        raise ValueError(f"{str(path)!r} has {len(lines)} captions for {count} images")
    return lines


def _paired(captions: Mapping[str, str], names: Sequence[str] | None, path: Path) -> list[str]:
    if names is None:
        raise ValueError(f"the captions in {str(path)!r} are by name, but the images have no names: give one a line")
    by_stem = {_stem(name): caption for name, caption in captions.items()}
    missing = next((name for name in names if _stem(name) not in by_stem), None)
    if missing is not None:
        raise ValueError(f"{str(path)!r} has no caption for the image {missing!r}")
    return [by_stem[_stem(name)] for name in names]


def _stem(name: str) -> str:
    return str(Path(name).with_suffix("")) if Path(name).name else name


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: {error}") from None
