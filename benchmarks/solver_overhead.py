"""What a solver costs beside its network: time of a run over (NFE x one bare forward pass), on the CPU or a GPU.

    OMP_NUM_THREADS=1 python benchmarks/solver_overhead.py [--batch 128] [--rounds 7] [--model digits-teacher]

Bare passes and runs take turns, and medians of their ratios are printed, so that a busy machine slows both alike; on
the CPU time is that of the process, which others do not stretch. The last column is what a step takes around a network
that costs nothing: where the machine is busy, it tells more than a ratio of two large numbers. Where diffusers is
installed, its two multistep schedulers run around the same network in the same rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from diffdistill import load_denoiser
from diffdistill.devices import device_of
from diffdistill.solvers import AMED, SOLVERS, AMEDPlugin, AMEDPredictor, make_schedule, make_solver, sample

NUM_STEPS = 20
SKIPPED = ("ddim", "amed", "edm_sde", "euler_ancestral", "flow_map")


def diffusers_loops(denoiser, noise, cond):
    """A loop around each scheduler that hands the network the same work, or nothing where diffusers is missing."""
    try:
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    except ImportError:
        return {}

    def loop(scheduler):
        def run():
            scheduler.set_timesteps(NUM_STEPS, device=noise.device)
            x = noise.clone()
            for t in scheduler.timesteps:
                sigma = torch.full((len(x),), 1.0 + 0.01 * float(t), dtype=torch.float64, device=x.device)
                x = scheduler.step(denoiser(x, sigma, cond), t, x).prev_sample
            return NUM_STEPS

        return run

    options = {"num_train_timesteps": 1000, "prediction_type": "sample"}
    return {
        "diffusers DPMSolverMultistep": loop(DPMSolverMultistepScheduler(**options)),
        "diffusers UniPCMultistep": loop(UniPCMultistepScheduler(**options)),
    }


class Free:
    """A network with the range of another that returns what it is given."""

    def __init__(self, denoiser) -> None:
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.bottleneck = torch.nn.Identity()

    def __call__(self, x, sigma, cond):
        return self.bottleneck(x)


def runs_of(denoiser, noise, cond) -> dict[str, Callable[[], int]]:
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    sigmas = make_schedule("polynomial", num_steps=NUM_STEPS, **ends)

    def ours(solver):
        def run():
            options = {"solver": solver, "sigmas": sigmas, "cond": cond}
            sample(denoiser, noise, **options)
            return NUM_STEPS * solver.stages  # counted by `sample` too; the tests hold both together

        return run

    fixed = {name: ours(make_solver(name)) for name in SOLVERS if name not in SKIPPED}
    predictor = AMEDPredictor().to(noise.device)
    learned = {"AMED-Solver": AMED(predictor)}
    learned |= {f"AMED-Plugin, {name}": AMEDPlugin(make_solver(name), predictor) for name in ("ipndm", "dpmpp")}
    return fixed | {name: ours(solver) for name, solver in learned.items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-teacher")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = device_of(given.device)
    denoiser = load_denoiser(given.model, device=device)
    noise = torch.randn(given.batch, *denoiser.data_shape, device=device)
    cond = torch.arange(given.batch, device=device) % denoiser.num_classes if denoiser.num_classes else None
    sigma = torch.full((given.batch,), 2.0, dtype=torch.float64, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def seconds(call) -> float:
        wait()
        started = clock()
        call()
        wait()
        return clock() - started

    def bare(count: int) -> None:
        for _ in range(count):
            denoiser(noise, sigma, cond)

    runs = runs_of(denoiser, noise, cond) | diffusers_loops(denoiser, noise, cond)
    bare(3)
    nfes: dict[str, int] = {}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    free = runs_of(Free(denoiser), noise, cond) | diffusers_loops(Free(denoiser), noise, cond)
    steps: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.rounds):
        for name, run in runs.items():
            if not ratios[name]:
                nfes[name] = run()  # the first call warms up
            nfe = nfes[name]
            half = nfe // 2
            before = seconds(lambda half=half: bare(half))
            taken = seconds(run)
            after = seconds(lambda rest=nfe - half: bare(rest))
            ratios[name].append(taken / (before + after))
            steps[name].append(seconds(free[name]) / NUM_STEPS)
    print(f"batch {given.batch} on {device}, {NUM_STEPS} steps: time / (NFE x bare forward) (least), us a step alone")
    for name, values in ratios.items():
        print(f"{name:32s} {median(values):.4f} ({min(values):.4f}) {1e6 * median(steps[name]):8.0f}")


if __name__ == "__main__":
    main()
