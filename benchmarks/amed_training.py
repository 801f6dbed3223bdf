"""Ways to train AMED's predictor: seconds and the memory that the graph holds, for the same trajectories.

    python benchmarks/amed_training.py [network=digits] [trajectories=512] [batch=128]

`network` names a file in configs/network; weights are random, which does for timing. On a GPU memory is the peak that
was allocated during training; on a CPU it is what autograd saved for the backward pass.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import yaml

from diffdistill.learned import StepwiseDistillation
from diffdistill.models import build_denoiser
from diffdistill.solvers import AMEDPlugin, AMEDPredictor, make_schedule, make_solver

CONFIGS = Path(__file__).parents[1] / "configs" / "network"
SHAPES = {"digits": (1, 8, 8), "ddpmpp_cifar10": (3, 32, 32)}
WAYS = {
    "plain": {"reuse": False},
    "reuse": {"reuse": True},
    "reuse, together": {"reuse": True, "together": True},
    "reuse, forward mode": {"reuse": True, "forward_mode": True},
    "reuse, together, forward mode": {"reuse": True, "together": True, "forward_mode": True},
}


def main(network: str = "digits", trajectories: int = 512, batch: int = 128) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = yaml.safe_load((CONFIGS / f"{network}.yaml").read_text())
    denoiser = build_denoiser({**config, "data_shape": SHAPES[network]}).to(device)
    print(f"{network} on {device}, {trajectories} trajectories in batches of {batch}, 3 intervals (5 evaluations)")
    for form in ("amed", "plugin ipndm"):
        for way, options in WAYS.items():
            if form == "amed" or not options.get("together"):
                print(measure(denoiser, form, way, options, trajectories, batch), flush=True)


def measure(denoiser: torch.nn.Module, form: str, way: str, options: dict, trajectories: int, batch: int) -> str:
    """A line with the milliseconds for a trajectory and the memory of one way."""
    device = next(denoiser.parameters()).device
    ends = {"sigma_min": 0.002, "sigma_max": 80.0}
    predictor = AMEDPredictor(0.01, 0.0 if form == "amed" else 0.2).to(device)
    if form == "amed":
        solver, teacher, points = make_solver("amed", predictor=predictor, afs=True), make_solver("heun"), 1
    else:
        solver, teacher, points = AMEDPlugin(make_solver("ipndm", afs=True), predictor), make_solver("ipndm"), 2
    objective = StepwiseDistillation(
        denoiser,
        solver,
        sigmas=make_schedule("polynomial", num_steps=3, **ends),
        teacher=teacher,
        teacher_sigmas=make_schedule("polynomial", num_steps=3 * (points + 1), **ends),
        **options,
    ).to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
    # all intervals together: the same rows in each optimiser step, of fewer trajectories
    size = batch // 3 if options.get("together") else batch
    for warm in (True, False):
        saved, largest = Saved(), 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = clock(device)
        for start in range(0, size if warm else trajectories, size):
            rows = {"index": torch.arange(start, start + size, device=device)}
            stream = objective.losses(rows, torch.Generator(device).manual_seed(start))
            while True:
                with saved:
                    loss = next(stream, None)
                if loss is None:
                    break
                largest = max(largest, saved.bytes)
                optimizer.zero_grad()
                loss.value.backward()
                optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
            largest = torch.cuda.max_memory_allocated()
        seconds = clock(device) - started
    return f"  {form:13s} {way:30s} {1e3 * seconds / trajectories:8.2f} ms per trajectory {largest / 2**20:9.1f} MiB"


def clock(device: torch.device) -> float:
    """Seconds: of the processor on a CPU, which other programs disturb less than the wall's, else of the wall."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves while it is entered, each storage once."""

    def __init__(self) -> None:
        self.bytes, self.storages = 0, set()
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self.bytes, self.storages = 0, set()
        super().__enter__()


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{name: value if name == "network" else int(value) for name, value in given.items()})
