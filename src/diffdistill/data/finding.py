"""What a folder holds: pictures in natural order, classes with their labels, and what is skipped and why."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffdistill.data.pictures import is_picture
from diffdistill.denoiser import NULL_LABEL
from diffdistill.files.contents import is_junk

MAX_LABEL = 100_000
"""Folders with greater numbers for names are dates or the like, not labels."""
SHOWN_CLASSES = 10
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Found:
    """What a folder or an archive holds.

    Attributes:
        place: its path.
        items: pictures and their labels, -1 for none.
        classes: label by name; empty where there are none.
        skipped: names of what is left out, by the reason.
    """

    place: str
    items: Sequence[tuple[str, int]]
    classes: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Labels there are: one more than the greatest."""
        return max(self.classes.values(), default=-1) + 1

    def without(self, reason: str, names: Sequence[str]) -> Found:
        """The same without some of the pictures."""
        gone = set(names)
        kept = [item for item in self.items if item[0] not in gone]
        return Found(self.place, kept, self.classes, {**self.skipped, reason: names} if names else self.skipped)

    def __str__(self) -> str:
        """One line: images, classes with their labels, and what is skipped."""
        text = f"{self.place}: {_count(len(self.items), 'image')}"
        if self.classes:
            shown = [f"{label} = {name}" for name, label in list(self.classes.items())[:SHOWN_CLASSES]]
            more = [f"... {self.num_classes - 1} = {list(self.classes)[-1]}"] * (len(self.classes) > SHOWN_CLASSES)
            text += f", {_count(len(self.classes), 'class', 'classes')} ({', '.join([*shown, *more])})"
        reasons = []
        for reason, names in self.skipped.items():
            more = ", ..." if len(names) > SHOWN_NAMES else ""
            reasons.append(f"{len(names)} {reason} ({', '.join(names[:SHOWN_NAMES])}{more})")
        return text + (f"; skipped: {', '.join(reasons)}" if reasons else "")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def natural(name: str) -> tuple[object, ...]:
    """A key for sorting in which 2 comes before 10."""
    parts = re.split(r"(\d+)", name)
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def in_order(names: Iterable[str]) -> list[str]:
    """Paths in natural order, folder by folder."""
    return sorted(names, key=lambda name: [natural(part) for part in Path(name).parts])


def find_pictures(root: str | os.PathLike[str], *, classes: bool = True) -> Found:
    """The pictures of a folder; its sub-folders, where any holds some, are the classes, unless `classes` is False.

    Folders that are named by numbers are labels themselves; others are labelled in natural order. Pictures beside
    folders of classes have no class, and are skipped; so is what systems leave, and what is no picture.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: two folders stand for the same label, or a number is too great for one.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {str(root)!r}")
    loose, skipped, within = [], {}, {}
    for entry in os.scandir(root):
        if is_junk(entry.name):
            skipped.setdefault("left by a system", []).append(entry.name)
        elif entry.is_dir():
            within[entry.name] = _pictures_below(root, entry.name, skipped)
        elif is_picture(entry.name):
            loose.append(entry.name)
        else:
            skipped.setdefault("no picture by its name", []).append(entry.name)
    if empty := [f"{name}/" for name, names in within.items() if not names]:
        skipped["without pictures"] = empty
    if not classes or len(empty) == len(within):
        loose += [name for names in within.values() for name in names]
        return Found(str(root), [(name, NULL_LABEL) for name in in_order(loose)], {}, _ordered(skipped))
    if loose:
        skipped["beside the folders of classes"] = loose
    labels = _labels(name for name, names in within.items() if names)
    items = [(name, label) for folder, label in labels.items() for name in in_order(within[folder])]
    return Found(str(root), items, labels, _ordered(skipped))


def _pictures_below(root: Path, folder: str, skipped: dict[str, list[str]]) -> list[str]:
    """Pictures in a folder and those within it, by their paths below the root."""
    found = []
    for place, folders, names in os.walk(root / folder, followlinks=True):
        below = os.path.relpath(place, root)
        for name in [name for name in (*folders, *names) if is_junk(name)]:
            skipped.setdefault("left by a system", []).append(f"{below}/{name}")
        folders[:] = [name for name in folders if not is_junk(name)]
        for name in names:
            if is_picture(name):
                found.append(f"{below}/{name}")
            elif not is_junk(name):
                skipped.setdefault("no picture by its name", []).append(f"{below}/{name}")
    return found


def _labels(names: Iterable[str]) -> dict[str, int]:
    names = in_order(names)
    if not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return {name: label for label, name in enumerate(names)}
    labels = {name: int(name) for name in names}
    if len(set(labels.values())) < len(labels):
        twice = next(name for name in names if list(labels.values()).count(labels[name]) > 1)
        raise ValueError(f"two folders stand for the label {labels[twice]}, one of them {twice!r}: rename one")
    if max(labels.values()) > MAX_LABEL:
        raise ValueError(
            f"the folder {names[-1]!r} would be a label, and make {max(labels.values()) + 1} classes of all"
        )
    return labels


def _ordered(skipped: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    return {reason: in_order(names) for reason, names in skipped.items()}
