"""Sampling, stage 1 and stage 2 with the networks of the papers, random weights, beside the bare network.

    python benchmarks/published_networks.py ddpmpp_cifar10 --batch 256
    python benchmarks/published_networks.py adm_imagenet64 --batch 64 --recompute
    torchrun --nproc_per_node=8 benchmarks/published_networks.py adm_imagenet64 --batch 512 --parallel fsdp

Prints a line for benchmarks/RESULTS.md. The matrix rate is that of one large product in the same precision, so that
the share of it that a network reaches can be compared over machines.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from diffdistill.devices import device_of
from diffdistill.generation import generate, plan, spread_labels
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.models import build_denoiser, guidance_student
from diffdistill.models.network import NetworkDenoiser
from diffdistill.progressive.stage2 import StepDistillation, deterministic_steps
from diffdistill.solvers import make_schedule
from diffdistill.training import Objective, Run, Trainer, TrainerConfig
from diffdistill.training.distributed import processes, rank, world_size
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting

CONFIGS = Path(__file__).parents[1] / "configs" / "network"
NETWORKS = {"digits": ((1, 8, 8), 10), "ddpmpp_cifar10": ((3, 32, 32), 10), "adm_imagenet64": ((3, 64, 64), 1000)}
W = (0.0, 4.0)


class Noise:
    """As many random images as a batch needs, in memory."""

    def __init__(self, shape: tuple[int, ...], classes: int, size: int) -> None:
        self.x = torch.randn(size, *shape).clamp(-1, 1)
        self.y = torch.arange(size) % classes

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "y": self.y[index]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"x": self.x, "y": self.y}


def seconds(work: Callable[[], object], rounds: int, device: torch.device, *, warm: int = 1) -> float:
    """Median seconds of `work`, after `warm` rounds that do not count."""
    times = []
    for _ in range(rounds + warm):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """1e12 operations per second of a square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, rounds, device) / 1e12


def teacher(name: str, device: torch.device) -> NetworkDenoiser:
    shape, classes = NETWORKS[name]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    denoiser = build_denoiser({**config, "data_shape": shape, "num_classes": classes}).to(device).eval()
    return denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def sampling(denoiser: NetworkDenoiser, options: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Images per second of a DDIM run, and its time over that of the bare network's evaluations."""
    scheme = plan(denoiser, num_steps=options.steps)
    scheme = replace(scheme, bf16=options.precision == "bf16")
    labels = spread_labels(options.batch, denoiser.num_classes)
    x = torch.randn(options.batch, *denoiser.data_shape, device=device)
    sigma, one_hot = torch.ones(options.batch, device=device), torch.zeros(options.batch, denoiser.num_classes)
    one_hot = one_hot.to(device)

    def bare() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=scheme.bf16):
            for _ in range(options.steps):
                denoiser.model(x, sigma, one_hot)

    def run() -> None:
        list(generate(scheme, range(options.batch), labels, batch_size=options.batch))

    run(), bare()
    # They take turns, so that drift of the machine cancels.
    pairs = [[seconds(work, 1, device, warm=0) for work in (run, bare)] for _ in range(options.rounds)]
    return options.batch / statistics.median(p[0] for p in pairs), statistics.median(a / b for a, b in pairs)


def objective(stage: int, denoiser: NetworkDenoiser) -> Objective:
    weighting = make_weighting("truncated_snr", sigma_data=denoiser.sigma_data)
    if stage == 1:
        noise = make_noise_levels("cosine")
        return GuidanceDistillation(denoiser, guidance_student(denoiser, W), noise_levels=noise, weighting=weighting)
    guided, student = guidance_student(denoiser, W), guidance_student(denoiser, W)
    ends = {"sigma_min": 0.0, "sigma_max": denoiser.sigma_max}
    steps = deterministic_steps(make_schedule("cosine", num_steps=8, **ends))
    return StepDistillation(guided, student, steps=steps, weighting=weighting, w_range=W)


def updates(stage: int, name: str, options: argparse.Namespace, device: torch.device) -> float:
    """Updates per second of the trainer."""
    shape, classes = NETWORKS[name]
    total = options.rounds + 1
    switches = {n: getattr(options, n) for n in ("precision", "accumulation", "recompute", "compile", "parallel")}
    settings = {"updates": total, "batch_size": options.batch, "channels_last": True, "device": options.device}
    config = TrainerConfig(**settings, **switches, ema_half_life=5e5, clip=1.0)
    with tempfile.TemporaryDirectory() as folder:
        data = Noise(shape, classes, options.batch)
        trainer = Trainer(objective(stage, teacher(name, device)), data, config, Run(Path(folder) / "run", {}))
        batches = iter(trainer._batches(range(total)))
        trainer.objective.train()
        return 1 / seconds(lambda: trainer._step(next(batches)), options.rounds, device)


def peak(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, default=64, help="samples of an update, over all processes")
    parser.add_argument("--steps", type=int, default=8, help="network evaluations of a sample")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with processes():
        device = device_of(options.device)
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        rate = matrix_rate(device, dtype, options.rounds)
        images, ratio = sampling(teacher(options.network, device), options, device)
        stages = [updates(stage, options.network, options, device) for stage in (1, 2)]
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        switches = [n for n in ("recompute", "compile") if getattr(options, n)]
        how = ", ".join([options.precision, *([options.parallel] if world_size() > 1 else []), *switches])
        cells = [options.network, f"{world_size()} x {hardware}", torch.__version__, how, str(options.batch)]
        cells += [f"{rate:.3g}", f"{images * world_size():.4g}", f"{ratio:.3f}", *(f"{s:.3g}" for s in stages)]
        if rank() == 0:
            print("| " + " | ".join([*cells, f"{peak(device):.2f}"]) + " |")


if __name__ == "__main__":
    main()
