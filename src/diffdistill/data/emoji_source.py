"""Make `emoji.npz` from the published graphics.

npm pack emoji-datasource-twitter@16.0.0 && tar xzf emoji-datasource-twitter-16.0.0.tgz
python -m diffdistill.data.emoji_source package src/diffdistill/data/emoji.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffdistill.data.emoji import CLASSES, RESOLUTIONS

SIZE = 64
"""Height and width of the graphics that are read."""
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
"""The publisher's category of each class, in label order. "Component" (parts such as hair) is none of them."""


def read_graphics(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """The emoji of an unpacked `emoji-datasource-twitter`, in the order of a keyboard.

    Skin tones are variations of an entry, hence left out. Entries whose picture another entry of the same class has
    already (most are the two genders of one person) are left out too.

    Args:
        package: the folder that holds `emoji.json` and `img/twitter/64`.

    Returns:
        Images, uint8 `[N, 32, 32, 3]`, over grey; labels, uint8 `[N]`.

    Raises:
        FileNotFoundError: no such package in that folder.
        ValueError: a picture of another size.
    """
    listing = package / "emoji.json"
    if not listing.is_file():
        raise FileNotFoundError(f"no emoji.json in {str(package)!r}: unpack emoji-datasource-twitter there")
    entries = json.loads(listing.read_text(encoding="utf-8"))
    entries = [entry for entry in entries if entry["has_img_twitter"] and entry["category"] in CATEGORIES]
    pictures: dict[tuple[int, bytes], np.ndarray] = {}
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        with Image.open(package / "img" / "twitter" / str(SIZE) / entry["image"]) as file:
            picture = over_grey(np.asarray(file.convert("RGBA")), resolution=max(RESOLUTIONS))
        pictures.setdefault((CATEGORIES.index(entry["category"]), picture.tobytes()), picture)
    return np.stack(list(pictures.values())), np.array([label for label, _ in pictures], dtype=np.uint8)


def over_grey(picture: np.ndarray, *, resolution: int) -> np.ndarray:
    """Lay a picture, uint8 RGBA `[64, 64, 4]`, over the grey 127.5 and average it down to `[resolution] * 2 + [3]`."""
    if picture.shape != (SIZE, SIZE, 4):
        raise ValueError(f"the graphics are {SIZE}x{SIZE} with four channels, not {list(picture.shape)}")
    alpha = picture[..., 3:] / 255
    opaque = alpha * picture[..., :3] + (1 - alpha) * 127.5
    block = SIZE // resolution
    return np.rint(opaque.reshape(resolution, block, resolution, block, 3).mean(axis=(1, 3))).astype(np.uint8)


def main(arguments: list[str]) -> None:
    """Read the package in the first argument and write the second."""
    if len(arguments) != 2:
        raise SystemExit((__doc__ or "").strip())
    images, labels = read_graphics(Path(arguments[0]))
    np.savez_compressed(arguments[1], x=images, y=labels)
    counts = np.bincount(labels, minlength=len(CLASSES))
    parts = ", ".join(f"{name} {count}" for name, count in zip(CLASSES, counts, strict=True))
    print(f"{len(images)} emoji ({parts}): {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
