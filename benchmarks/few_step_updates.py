"""What an update of each method of few steps costs, over the bare calls of the network that it cannot do without.

    python benchmarks/few_step_updates.py [batch=64] [rounds=5]

The floor is made of the network of `configs/network/digits.yaml` itself, with random weights: of consistency one
teacher and one student evaluation without gradients, one with them and its backward pass, and the optimiser; of a flow
map the bare `torch.func.jvp` in place of the student's evaluation. Times are of the processor, the least of all rounds,
with updates and floors in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.models import build_denoiser, flow_map_student, guidance_student
from diffdistill.progressive.consistency import ConsistencyDistillation
from diffdistill.progressive.flow_map import FlowMapDistillation
from diffdistill.solvers import make_schedule
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting

CONFIG = Path(__file__).parents[1] / "configs/network/digits.yaml"


def main(batch: int = 64, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    config = {**yaml.safe_load(CONFIG.read_text()), "data_shape": (1, 8, 8), "num_classes": 10}
    teacher = guidance_student(build_denoiser(config), (0.0, 4.0))
    student = flow_map_student(teacher)
    shared = {"weighting": make_weighting("edm"), "w_range": teacher.w_range}
    cosine = make_noise_levels("cosine")
    sigmas = make_schedule("cosine", num_steps=4, sigma_min=0.0, sigma_max=80.0)
    objectives = {
        "consistency": ConsistencyDistillation(teacher, student, sigmas=sigmas, fine=(2, 8), **shared),
        "flow map, eulerian": FlowMapDistillation(teacher, student, noise_levels=cosine, **shared),
        "flow map, lagrangian": FlowMapDistillation(teacher, student, noise_levels=cosine, form="lagrangian", **shared),
    }
    data = {"x": torch.randn(batch, 1, 8, 8), "y": torch.arange(batch) % 10}
    inputs = data["x"], torch.rand(batch).double() + 0.1, data["y"], torch.rand(batch), torch.rand(batch).double() * 0.1
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    for name, objective in objectives.items():
        objective.progress = 0.5

        def update(objective=objective) -> None:
            objective.loss(data, torch.Generator().manual_seed(0)).value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        derivative = None if name == "consistency" else name.rpartition(" ")[2]
        bare = floor(teacher, student, inputs, derivative, optimizer)
        times = [(seconds(update), seconds(bare)) for _ in range(rounds)]
        spent, least = (min(column) for column in zip(*times, strict=True))
        print(f"| {name} | {1e3 * spent:.0f} | {1e3 * least:.0f} | {spent / least:.3f} |", flush=True)


def floor(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    derivative: str | None,
    optimizer: torch.optim.Optimizer,
) -> Callable[[], None]:
    """The calls that an update cannot do without."""
    x, sigma, y, w, s = inputs

    def call(x: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        return student(x, sigma, y, w=w, s=s)

    def run() -> None:
        with torch.no_grad():
            teacher(x, sigma, y, w=w)
            if derivative is None:
                call(x, sigma, s)
            else:
                still = derivative == "lagrangian"
                function = (lambda s: call(x, sigma, s)) if still else (lambda x, sigma: call(x, sigma, s))
                point = (s,) if still else (x, sigma)
                with sdpa_kernel(SDPBackend.MATH):
                    torch.func.jvp(function, point, tuple(map(torch.ones_like, point)))
        call(x, sigma, s).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def seconds(function: Callable[[], None]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (argument.split("=") for argument in sys.argv[1:])})
