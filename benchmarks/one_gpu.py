"""All that one GPU can show, in one command, the most important first; meant for the first minutes on a machine.

    python benchmarks/one_gpu.py [--minutes 8] [--out runs/one_gpu.md]

Every line is written as soon as it is measured, ready for benchmarks/RESULTS.md. What has not begun when the minutes
are over is left out, and what fails is named in one line. The parts:

- sampling with DDPM++, and what each switch gains over plain float32; `published_networks.py` says what a column means;
- Frechet distance of samples in bf16 with CUDA graphs to those in float32, beside that of other seeds;
- both stages of distillation and AMED training, the latter also beside its plain way;
- the tests that need a GPU;
- the other networks, recomputed activations, and a small batch.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import amed_training
import published_networks
from diffdistill import load_denoiser
from diffdistill.denoiser import spread_labels
from diffdistill.devices import device_of
from diffdistill.errors import one_line
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.features import gaussian_of
from diffdistill.metrics.frechet import frechet_distance
from diffdistill.models.acceleration import accelerated
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan
from networks import network

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "ddpmpp_cifar10 --batch 256 --precision fp32 --only sampling --rounds 4"
SAMPLING = (
    "ddpmpp_cifar10 --batch 256 --cuda-graph --only sampling --rounds 4",
    "ddpmpp_cifar10 --batch 256 --only sampling --rounds 4",
    "ddpmpp_cifar10 --batch 256 --compile --cuda-graph --only sampling --rounds 4",
)
ROWS = (
    "ddpmpp_cifar10 --batch 256 --only stages amed --rounds 4",
    "adm_imagenet64 --batch 64 --cuda-graph --only sampling --rounds 3",
    "adm_imagenet64 --batch 32 --only stages --rounds 3",
    "sd15_unet --batch 8 --cuda-graph --only sampling --rounds 3",
    "sd15_unet --batch 4 --only stages --rounds 3",
    "ddpmpp_cifar10 --batch 256 --recompute --only stages --rounds 3",
    "adm_imagenet64 --batch 32 --recompute --only stages --rounds 3",
    "unet2d_cifar10 --batch 256 --only sampling --rounds 3",
    "ddpmpp_cifar10 --batch 16 --only sampling --rounds 4",
    "ddpmpp_cifar10 --batch 16 --cuda-graph --only sampling --rounds 4",
)
SAMPLES, STEPS = 5000, 16
AMED_NETWORK, TRAJECTORIES = "ddpmpp_cifar10", 64


def gpu_tests(device: torch.device) -> Iterator[str]:
    """The last line of pytest on the tests that need a GPU, and the names of those that fail."""
    files = ("tests/test_acceleration.py", "tests/models/test_layers.py")
    command = [sys.executable, "-m", "pytest", *files, "-k", "on_a_gpu or cuda", "-q", "-rf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield from (line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    yield f"GPU tests: {(done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]}"


def row(line: str, device: torch.device) -> list[str]:
    options = published_networks.arguments([*line.split(), "--device", str(device)])
    return published_networks.row(options, device)


def sampling(device: torch.device) -> Iterator[str]:
    """Rows of sampling, each with what it gains over plain float32."""
    yield published_networks.HEAD
    rates: list[float] = []
    for line in (PLAIN, *SAMPLING):
        cells = row(line, device)
        rates.append(float(cells[published_networks.COLUMNS.index("images/s")]))
        yield f"| {' | '.join(cells)} |"
        if len(rates) > 1:
            yield f"images/s of `{line}` over plain float32: {rates[-1] / rates[0]:.2f}"


def one_row(line: str) -> Callable[[torch.device], Iterator[str]]:
    def work(device: torch.device) -> Iterator[str]:
        yield f"| {' | '.join(row(line, device))} |"

    return work


def distances(device: torch.device) -> Iterator[str]:
    """Frechet distances of sample sets of the digits teacher, w = 1."""
    teacher, features = load_denoiser("digits-teacher", device=device), make_features("digit_pixels")
    exact = plan(teacher, w=1.0, num_steps=STEPS)
    graphs = accelerated(exact.denoiser, cuda_graph=device.type == "cuda")
    fast = replace(exact, denoiser=graphs, bf16=True)

    def statistics(planned, first: int):  # of SAMPLES seeds from `first` on
        labels = spread_labels(SAMPLES, teacher.num_classes)
        return gaussian_of(features, torch.cat(list(generate(planned, range(first, first + SAMPLES), labels))))

    plain = statistics(exact, 0)
    same = frechet_distance(plain, statistics(fast, 0))
    spread = frechet_distance(plain, statistics(exact, SAMPLES))
    what = f"Frechet distance of {SAMPLES} digits, {STEPS} steps"
    yield f"{what}: bf16 to float32 {same:.2g}, float32 to that of other seeds {spread:.2g}"


def ways_to_train(device: torch.device) -> Iterator[str]:
    """Milliseconds and memory for a trajectory of AMED training."""
    denoiser = network(AMED_NETWORK).to(device)
    for way in ("plain", "reuse", "reuse, forward mode"):
        yield amed_training.measure(
            denoiser, "plugin ipndm", way, amed_training.WAYS[way], 2 * TRAJECTORIES, TRAJECTORIES
        )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing more is begun after them")
    parser.add_argument("--out", type=Path, default=Path("runs/one_gpu.md"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(given)
    device, started = device_of(options.device), time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    parts = [sampling, distances, one_row(ROWS[0]), ways_to_train, gpu_tests, *map(one_row, ROWS[1:])]
    for number, part in enumerate(parts, 1):
        minutes = (time.monotonic() - started) / 60
        if minutes > options.minutes:
            say(f"{minutes:.1f} minutes: parts {number} to {len(parts)} were not begun")
            return
        try:
            for line in part(device):
                say(line)
        except Exception as error:  # out of memory, or what this GPU cannot do: the other parts go on
            reason = one_line(error)
            say(f"part {number} failed: {type(error).__name__}: {reason}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
