"""From a model's name to images: how a model is sampled, and sampling many seeds in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Denoiser
from diffdistill.learned.files import load_predictor
from diffdistill.models import guided
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import Euler, GaussianStart, Solver, make_schedule, make_solver, sample, seeded_noise


@dataclass(frozen=True)
class Plan:
    """A denoiser with the solver, the noise levels and the analytic start to sample it with.

    With `bf16` the network runs in bfloat16 by autocast; the solver's arithmetic stays in float32.
    """

    denoiser: Denoiser
    solver: Solver
    sigmas: Tensor
    start: GaussianStart | None = None
    bf16: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))


def schedule_for(denoiser: Denoiser, options: Mapping[str, Any]) -> Tensor:
    """The schedule of `options` (of `make_schedule`) between the ends of a denoiser, where they do not say others.

    The schedule "trailing" takes the table of a discrete-time denoiser.
    """
    given: dict[str, Any] = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    table = getattr(getattr(denoiser, "preconditioning", None), "table", None)
    if options["name"] == "trailing" and table is not None:
        given["table"] = table.cpu()
    return make_schedule(**{**given, **options})


def plan(
    model: Denoiser,
    *,
    w: float | None = None,
    solver: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
) -> Plan:
    """Say how to sample `model`.

    Args:
        model: from `load_denoiser`.
        w: guidance weight; None leaves the model as it is.
        solver: options of `make_solver`, "euler" by default, or `name` "learned" and `predictor`, the name or path of
            a learned solver. A few-step student brings its own sampler.
        schedule: options of `make_schedule`, by default "cosine" down to sigma = 0. Students and learned solvers bring
            their own.
        num_steps: steps of the schedule; students and learned solvers have only their own.

    Raises:
        ValueError: a number of steps that a student or a learned solver was not trained for, a denoiser or a weight
            that a learned solver was not trained for, or no number of steps where one is needed.
    """
    denoiser = model if w is None else guided(model, w)
    own = model.distilled
    if own is not None:
        if num_steps not in (None, own.num_steps):
            raise ValueError(f"num_steps={num_steps}: this student was distilled for {own.num_steps} steps only")
        if solver is not None or schedule is not None:
            raise ValueError(
                "a few-step student brings its own sampler and noise levels: leave out solver and schedule"
            )
        levels = torch.tensor(own.sigmas, dtype=torch.float64)
        return Plan(denoiser, StochasticEuler() if own.sampler == "stochastic" else Euler(), levels)
    if solver is not None and solver["name"] == "learned":
        if schedule is not None:
            raise ValueError("a learned solver brings its own noise levels: leave out schedule")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        learned = load_predictor(solver["predictor"], device=device)
        learned.check(denoiser, num_steps=num_steps)
        return Plan(denoiser, learned.solver, learned.sigmas, learned.gaussian_start())
    if num_steps is None:
        raise ValueError("num_steps is missing: this model was not distilled to a number of steps, so choose one")
    grid = {"name": "cosine", "sigma_min": 0.0} if schedule is None else schedule
    sigmas = schedule_for(model, {"num_steps": num_steps, **grid})
    return Plan(denoiser, make_solver(**(solver or {"name": "euler"})), sigmas)


def spread_labels(num_samples: int, num_classes: int) -> Tensor | None:
    """Labels `[num_samples]` spread evenly over the classes, or None where there are no classes."""
    return torch.arange(num_samples) % num_classes if num_classes else None


def generate(
    plan: Plan, seeds: Sequence[int] | Tensor, labels: Tensor | None, *, batch_size: int = 256
) -> Iterator[Tensor]:
    """Yield images `[<= batch_size, ...]` for each seed in turn; a seed gives the same image at any batch size."""
    device = plan.device
    for start in range(0, len(seeds), batch_size):
        chunk = seeds[start : start + batch_size]
        cond = None if labels is None else labels[start : start + batch_size].to(device)
        noise = seeded_noise(chunk, plan.denoiser.data_shape, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16):
            x = sample(
                plan.denoiser, noise, solver=plan.solver, sigmas=plan.sigmas, cond=cond, seeds=chunk, start=plan.start
            )
        yield x


def count_nfe(plan: Plan) -> int:
    """Network evaluations of one sample, counted by drawing one."""
    noise = seeded_noise([0], plan.denoiser.data_shape, device=plan.device)
    cond = spread_labels(1, plan.denoiser.num_classes)
    cond = None if cond is None else cond.to(plan.device)
    options = {"solver": plan.solver, "sigmas": plan.sigmas, "cond": cond, "start": plan.start}
    run = sample(plan.denoiser, noise, return_trajectory=True, **options)
    return run.nfe


def preview(*, num_samples: int, w: float | None = None, num_steps: int | None = None) -> Callable[[Denoiser], Tensor]:
    """A function that draws the same `num_samples` seeds from a model each time, for the grids of a training run."""

    def draw(model: Denoiser) -> Tensor:
        labels = spread_labels(num_samples, model.num_classes)
        return torch.cat(list(generate(plan(model, w=w, num_steps=num_steps), range(num_samples), labels)))

    return draw
