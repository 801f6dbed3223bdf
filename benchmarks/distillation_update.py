"""Time of one stage-1 and one stage-2 update relative to its floor.

    python benchmarks/distillation_update.py [--batch 128] [--rounds 30] [--device cpu]

The floor is the same network, bare: the forward pass of the teacher's batches, forward and backward of the student,
and the optimiser's step, on inputs that lie ready. Update and floor take turns, so that drift of the machine cancels;
the printed ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from diffdistill.data import load_data
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.models import build_denoiser, guidance_student
from diffdistill.progressive.stage2 import StepDistillation, deterministic_steps
from diffdistill.solvers import make_schedule
from diffdistill.training import Objective, Run, Trainer, TrainerConfig
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.weighting import make_weighting

NETWORK = Path(__file__).parents[1] / "configs" / "network" / "digits.yaml"
MODEL = {**yaml.safe_load(NETWORK.read_text()), "data_shape": [1, 8, 8], "num_classes": 10}


def stage(name: str) -> tuple[Objective, list[int]]:
    """The objective of a stage, and the teacher's forward passes in an update, each in units of the batch."""
    weighting = make_weighting("truncated_snr")
    teacher = build_denoiser(MODEL)
    if name == "stage 1":
        student = guidance_student(teacher, (0.0, 4.0))
        noise_levels = make_noise_levels("cosine")
        return GuidanceDistillation(teacher, student, noise_levels=noise_levels, weighting=weighting), [2]
    guided = guidance_student(teacher, (0.0, 4.0))
    student = guidance_student(teacher, (0.0, 4.0))
    steps = deterministic_steps(make_schedule("cosine", num_steps=8, sigma_min=0, sigma_max=80))
    return StepDistillation(guided, student, steps=steps, weighting=weighting, w_range=(0.0, 4.0)), [1, 1]


def floor(objective: Any, forwards: list[int], config: TrainerConfig, device: torch.device) -> Callable[[], None]:
    """One update of the bare networks on inputs that lie ready."""
    student = guidance_student(build_denoiser(MODEL), (0.0, 4.0)).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(list(student.parameters()), config)

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        labels = torch.eye(10, device=device)[torch.arange(batch, device=device) % 10]
        return torch.randn(batch, 1, 8, 8, device=device), torch.randn(batch, device=device), labels

    takes_w = objective.teacher.w_range is not None
    ready = [(*inputs(n * config.batch_size), torch.rand(n * config.batch_size, device=device)) for n in forwards]
    given = (*inputs(config.batch_size), torch.rand(config.batch_size, device=device))

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                for batch in ready:
                    objective.teacher.model(*(batch if takes_w else batch[:3]))
            out = student.model(*given)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def measure(name: str, batch: int, rounds: int, device: torch.device) -> tuple[float, float, float]:
    """Median milliseconds of update and floor, and the median of their ratios."""
    objective, forwards = stage(name)
    settings = {"updates": rounds + 5, "batch_size": batch, "precision": "bf16", "channels_last": True}
    config = TrainerConfig(**settings, ema_half_life=5000, device=str(device), log_every=25)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(objective, load_data("digits"), config, Run(folder, settings))
        bare = floor(objective, forwards, config, device)
        batches = trainer._batches(range(rounds + 5))
        pairs = []
        for k in range(rounds + 5):
            times = []
            for work in (lambda: trainer._step(next(batches)), bare):
                started = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - started))
            trainer.update += 1
            if k >= 5:
                pairs.append(times)
    update, least = (statistics.median(column) for column in zip(*pairs, strict=True))
    return update, least, statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, batch {options.batch}")
    for name in ("stage 1", "stage 2"):
        update, least, ratio = measure(name, options.batch, options.rounds, torch.device(options.device))
        print(f"{name}: update {update:.1f} ms, floor {least:.1f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
