"""What reading a folder of images costs before they are measured, beside the reader of torch-fidelity.

    OMP_NUM_THREADS=1 python benchmarks/reading.py [--images 10000] [--side 32] [--rounds 5]

Both read the same PNG files, from opening the folder to the last batch of floats; torch-fidelity through its own data
set and the loader that it makes on a CPU. They take turns, and the median of the ratios is printed; time is that of the
process, which others do not stretch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffdistill.metrics.sources import StoredImages, open_images

BATCH = 64


def write(folder: Path, count: int, side: int) -> None:
    numbers = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def ours(folder: Path) -> int:
    source, count = StoredImages(open_images(folder)), 0
    for x, _ in source.batches(range(len(source)), BATCH, torch.device("cpu")):
        count += len(x)
    return count


def theirs(folder: Path) -> int:
    from torch_fidelity.datasets import ImagesPathDataset

    files, count = sorted(str(path) for path in folder.glob("*.png")), 0
    for x in DataLoader(ImagesPathDataset(files), batch_size=BATCH, num_workers=0):
        count += len(x.float())
    return count


def seconds(read, folder: Path, expected: int) -> float:
    started = time.process_time()
    assert read(folder) == expected
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), options.images
        write(folder, count, options.side)
        ours(folder), theirs(folder)
        rounds = [(seconds(ours, folder, count), seconds(theirs, folder, count)) for _ in range(options.rounds)]
    print(f"{count} images of {options.side}x{options.side}, medians of {len(rounds)} rounds:")
    print(f"diffdistill {median(a for a, _ in rounds):.2f} s, torch-fidelity {median(b for _, b in rounds):.2f} s")
    print(f"ratio {median(a / b for a, b in rounds):.3f}")


if __name__ == "__main__":
    main()
