"""Sampling, both stages and AMED training with the networks of the papers, random weights, beside the bare network.

    python benchmarks/published_networks.py ddpmpp_cifar10 --batch 256
    python benchmarks/published_networks.py ddpmpp_cifar10 --batch 256 --cuda-graph --precision bf16
    python benchmarks/published_networks.py ddpmpp_cifar10 --batch 256 --precision fp32 --only sampling
    python benchmarks/published_networks.py adm_imagenet64 --vary batch 16 32 64 128
    python benchmarks/published_networks.py sd15_unet --batch 8 --vary resolution 32 64 96
    torchrun --nproc_per_node=8 benchmarks/published_networks.py adm_imagenet64 --batch 512 --parallel fsdp

Prints a line for benchmarks/RESULTS.md; benchmarks/one_gpu.py makes the most important ones of one GPU. What it
means:

- share: operations of the bare network in a second over those of one large matrix product in the same precision, so
  that machines can be compared;
- over bare: time of sampling over that of the same evaluations of the bare network, in turns, so that drift of the
  machine cancels; with --compile and --cuda-graph the bare network is still eager. The noise of a run is drawn while
  the run before it is under way, as `generate` does;
- diffusers: images per second of the same evaluations in the loop of diffusers' DDIM: `DDIMPipeline` for unet2d_*, and
  `DDIMScheduler` around the same network for the others;
- over floor: time of an update over that of the bare networks' forward and backward passes and the optimiser's step.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffdistill.devices import device_of, tuned_convolutions
from diffdistill.distributed import processes, rank, world_size
from diffdistill.guidance.stage1 import GuidanceDistillation
from diffdistill.learned import StepwiseDistillation
from diffdistill.models import Wrapper, guidance_student
from diffdistill.models.acceleration import accelerated
from diffdistill.models.network import NetworkDenoiser
from diffdistill.progressive.stage2 import StepDistillation, deterministic_steps
from diffdistill.sampling.plans import plan
from diffdistill.solvers import AMEDPlugin, AMEDPredictor, make_schedule, make_solver, sample, seeded_noise
from diffdistill.training import Objective, Run, Trainer, TrainerConfig
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.sharding import recompute
from diffdistill.training.weighting import make_weighting
from networks import NAMES, Noise, bare, condition, network

W = (0.0, 4.0)
COLUMNS = ("network", "hardware", "torch", "how", "batch", "steps", "pixels", "matrix TFLOP/s", "share", "images/s")
COLUMNS += ("over bare", "diffusers images/s", "stage 1 updates/s", "over floor", "stage 2 updates/s", "over floor")
COLUMNS += ("AMED trajectories/s", "peak GiB")
HEAD = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, until the device is done: of the processor on a CPU, which other programs disturb less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def in_turns(works: list[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each work, in `rounds` rounds after one that does not count: `[rounds][works]`."""
    return [[seconds(work, device) for work in works] for _ in range(rounds + 1)][1:]


def median(times: list[list[float]], place: int = 0) -> float:
    return statistics.median(row[place] for row in times)


def ratio(times: list[list[float]]) -> float:
    """The first work over the second."""
    return statistics.median(first / second for first, second, *_ in times)


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """1e12 operations per second of a square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median(in_turns([lambda: a @ b], rounds, device)) / 1e12


def teacher(options: argparse.Namespace, device: torch.device) -> NetworkDenoiser:
    denoiser = network(options.network, options.resolution).to(device).eval()
    return denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def diffusers_loop(denoiser: NetworkDenoiser, options: argparse.Namespace, device: torch.device) -> Any:
    """The same evaluations in the loop of diffusers, or None where it is not installed."""
    try:
        from diffusers import DDIMPipeline, DDIMScheduler
    except ImportError:
        return None
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    if options.network.startswith("unet2d"):
        pipeline = DDIMPipeline(denoiser.model.module, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        call = {"batch_size": options.batch, "num_inference_steps": options.steps, "output_type": "np"}
        return lambda: pipeline(**call)
    given = condition(denoiser, options.batch, device)
    if denoiser.num_classes:
        given = torch.zeros(options.batch, denoiser.num_classes, device=device)

    def run() -> None:
        scheduler.set_timesteps(options.steps, device=device)
        x = torch.randn(options.batch, *denoiser.data_shape, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.model(x, t.expand(len(x)).float(), given), t, x).prev_sample

    return run


def sampling(options: argparse.Namespace, device: torch.device, rate: float) -> list[float | None]:
    """The bare network's share of the matrix rate, images per second, over bare, and images per second of diffusers."""
    denoiser = teacher(options, device)
    planned = plan(denoiser, num_steps=options.steps)
    fast = accelerated(denoiser, compile=options.compile, cuda_graph=options.cuda_graph)
    planned = replace(planned, denoiser=fast)
    cond, evaluate = condition(denoiser, options.batch, device), bare(denoiser, options.batch, device)
    drawn = [seeded_noise(range(options.batch), denoiser.data_shape, device=device)]

    def ours() -> None:
        sample(planned.denoiser, drawn.pop(), solver=planned.solver, sigmas=planned.sigmas, cond=cond)
        drawn.append(seeded_noise(range(options.batch), denoiser.data_shape, device=device))

    def alone() -> None:
        for _ in range(options.steps):
            evaluate()

    theirs = diffusers_loop(denoiser, options, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        with FlopCounterMode(display=False) as counter:
            evaluate()
        times = in_turns([ours, alone, *([theirs] if theirs else [])], options.rounds, device)
    share = counter.get_total_flops() * options.steps / median(times, 1) / 1e12 / rate
    images = [options.batch * world_size() / median(times, place) for place in ((0, 2) if theirs else (0,))]
    return [share, images[0], ratio(times), images[1] if theirs else None]


def objective(stage: int, denoiser: NetworkDenoiser) -> tuple[Objective, list[int]]:
    """The objective of a stage, and the teacher's forward passes in an update, each in units of the batch."""
    weighting = make_weighting("truncated_snr", sigma_data=denoiser.sigma_data)
    if stage == 1:
        noise = make_noise_levels("cosine")
        student = guidance_student(denoiser, W)
        return GuidanceDistillation(denoiser, student, noise_levels=noise, weighting=weighting), [2]
    guided, student = guidance_student(denoiser, W), guidance_student(denoiser, W)
    ends = {"sigma_min": 0.0, "sigma_max": denoiser.sigma_max}
    steps = deterministic_steps(make_schedule("cosine", num_steps=8, **ends))
    return StepDistillation(guided, student, steps=steps, weighting=weighting, w_range=W), [1, 1]


def floor(trained: Any, forwards: list[int], config: TrainerConfig, device: torch.device) -> Callable[[], None]:
    """One update of the bare networks on inputs that lie ready."""
    batch = config.batch_size // config.accumulation
    student = copy.deepcopy(trained.trained).requires_grad_(True)
    if config.recompute:
        recompute(student)
    optimizer = make_optimizer(list(student.parameters()), config)
    teacher = trained.teacher.denoiser if isinstance(trained.teacher, Wrapper) else trained.teacher
    passes = [bare(teacher, n * batch, device) for n in forwards]
    own = bare(student, batch, device)

    def update() -> None:
        for _ in range(config.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                with torch.no_grad():
                    for evaluate in passes:
                        evaluate()
                out = own()
            out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def updates(stage: int, options: argparse.Namespace, device: torch.device) -> list[float | None]:
    """Updates per second of the trainer, and the time of one over its floor (of one process that compiles nothing)."""
    total = options.rounds + 1
    switches = {n: getattr(options, n) for n in ("precision", "accumulation", "recompute", "compile", "parallel")}
    settings = {"updates": total, "batch_size": options.batch, "channels_last": True, "device": options.device}
    config = TrainerConfig(**settings, **switches, ema_half_life=5e5)
    denoiser = teacher(options, device)
    trained, forwards = objective(stage, denoiser)
    data = Noise(denoiser, options.batch)
    least = None
    if world_size() == 1 and not options.compile:
        least = floor(trained.to(device), forwards, config, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(trained, data, config, Run(Path(folder) / "run", {}))
        batches = iter(trainer._batches(range(total)))
        trainer.objective.train()
        works = [lambda: trainer._step(next(batches)), *([least] if least else [])]
        times = in_turns(works, options.rounds, device)
    return [1 / median(times), ratio(times) if least else None]


def amed(options: argparse.Namespace, device: torch.device) -> float:
    """Trajectories per second of training AMED-Plugin on iPNDM with three intervals, five evaluations."""
    denoiser = teacher(options, device)
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    predictor = AMEDPredictor(0.01, 0.2).to(device)
    levels, fine = (make_schedule("polynomial", num_steps=n, **ends) for n in (3, 9))
    solver = AMEDPlugin(make_solver("ipndm", afs=True), predictor)
    trained = StepwiseDistillation(
        denoiser, solver, sigmas=levels, teacher=make_solver("ipndm"), teacher_sigmas=fine
    ).to(device)
    optimizer, generator = torch.optim.Adam(predictor.parameters(), lr=5e-3), torch.Generator(device)
    batch = {"noise": torch.randn(options.batch, *denoiser.data_shape, device=device)}
    batch["cond"] = condition(denoiser, options.batch, device)

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            for loss in trained.losses(batch, generator):
                loss.value.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return options.batch * world_size() / median(in_turns([update], options.rounds, device))


def peak(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def row(options: argparse.Namespace, device: torch.device) -> list[str]:
    """The cells of one line."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    wanted = options.only or ("sampling", "stages", "amed")
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    rate = matrix_rate(device, dtype, options.rounds)
    trains = not options.network.startswith("unet2d")  # which takes no guidance weight
    numbers: list[float | None] = [rate]
    with tuned_convolutions():
        numbers += sampling(options, device, rate) if "sampling" in wanted else [None] * 4
        for stage in (1, 2):
            numbers += updates(stage, options, device) if "stages" in wanted and trains else [None] * 2
        numbers += [amed(options, device) if "amed" in wanted else None, peak(device)]
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    switches = [n.replace("_", " ") for n in ("recompute", "compile", "cuda_graph") if getattr(options, n)]
    how = ", ".join([options.precision, *([options.parallel] if world_size() > 1 else []), *switches])
    cells = [options.network, f"{world_size()} x {hardware}", torch.__version__, how, str(options.batch)]
    pixels = options.resolution or network_size(options.network)
    return [*cells, str(options.steps), str(pixels), *("" if n is None else f"{n:.4g}" for n in numbers)]


def network_size(name: str) -> int:
    from networks import DIFFUSERS, SHAPES

    return DIFFUSERS[name]["options"]["sample_size"] if name in DIFFUSERS else SHAPES[name][0][-1]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NAMES)
    parser.add_argument("--batch", type=int, default=64, help="samples of an update, over all processes")
    parser.add_argument("--steps", type=int, default=8, help="network evaluations of a sample")
    parser.add_argument(
        "--resolution", type=int, help="pixels (or latents) along an edge, in place of the network's own"
    )
    parser.add_argument(
        "--vary", nargs="+", metavar=("WHAT", "VALUE"), help="batch, steps or resolution, and its values"
    )
    parser.add_argument("--only", nargs="+", choices=("sampling", "stages", "amed"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true")
    options = parser.parse_args(given)
    if options.vary and (options.vary[0] not in ("batch", "steps", "resolution") or len(options.vary) < 2):
        parser.error(f"--vary takes batch, steps or resolution, and values, not {' '.join(options.vary)}")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    what, values = (options.vary[0], map(int, options.vary[1:])) if options.vary else ("batch", [options.batch])
    with processes():
        device = device_of(options.device)
        if rank() == 0:
            print(HEAD)
        for value in values:
            setattr(options, what, value)
            cells = row(options, device)
            if rank() == 0:
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
