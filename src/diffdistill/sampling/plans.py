"""How a model is to be sampled: guidance, solver, noise levels and start, checked against each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import Codec, Denoiser, Distilled, spread_labels
from diffdistill.devices import device_of, native_bf16
from diffdistill.learned.storage import load_predictor
from diffdistill.models import guided
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.registry import choose
from diffdistill.solvers import (
    Euler,
    FlowMap,
    GaussianStart,
    Solver,
    load_gaussian,
    make_schedule,
    make_solver,
    seeded_noise,
    shipped_gaussians,
)
from diffdistill.solvers.guidance import make_guidance_weight
from diffdistill.solvers.schedules import OF_A_TABLE
from diffdistill.training.inputs import inputs_of

END_TOLERANCE = 1e-3
"""Relative; a level above the model's range by more is one that it does not know."""
WARM_UP_SAMPLES = 256
"""Trajectories from which GITS chooses a schedule (Chen et al. 2024, Section 4)."""
WARM_UP_SEED = 2_000_000
"""Their seeds start here, far from those that are evaluated."""
WARM_UP_STEPS = 60
"""Their steps."""


@dataclass(frozen=True)
class Plan:
    """A denoiser with the solver, the noise levels, the analytic start and the thresholding to sample it with.

    With `bf16` the network runs in bfloat16 by autocast; the solver's arithmetic stays in float32. `preparation_nfe`
    counts the network evaluations that choosing the noise levels took, over all trajectories. `codec` is the
    autoencoder of a latent model that holds none itself.
    """

    denoiser: Denoiser
    solver: Solver
    sigmas: Tensor
    start: GaussianStart | None = None
    thresholding: str | None = None
    bf16: bool = False
    preparation_nfe: int = 0
    codec: Codec | None = None
    guidance: Callable[[float], float] | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def options(self) -> dict[str, Any]:
        """What `sample` takes of it, beside the denoiser."""
        names = ("solver", "sigmas", "start", "thresholding", "guidance")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return device_of(self.denoiser)

    def pictures(self, x: Tensor) -> Tensor:
        """What was sampled, `[B, ...]`, as images: the latents of a latent model are decoded."""
        codec = self.codec or self.denoiser.codec
        return x if codec is None else codec.decode(x)


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether to sample in bf16: "bf16", or "auto" on a GPU that has instructions for it.

    On a CPU "auto" is float32, where a seed gives the same image in batches of any size.

    Raises:
        ValueError: an unknown precision.
    """
    auto = device.type == "cuda" and native_bf16(device)
    return choose("precision", precision, {"auto": auto, "fp32": False, "bf16": True})


def schedule_for(denoiser: Denoiser, options: Mapping[str, Any]) -> Tensor:
    """The schedule of `options` (of `make_schedule`) between the ends of a denoiser, where they do not say others.

    The schedules of a table take that of a discrete-time denoiser; "flow" has ends of its own.
    """
    given: dict[str, Any] = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    if options["name"] == "flow":
        given = {}
    if options["name"] in OF_A_TABLE and denoiser.table is not None:
        given["table"] = denoiser.table.cpu()
    sigmas = make_schedule(**{**given, **options})
    if float(sigmas[0]) > denoiser.sigma_max * (1 + END_TOLERANCE):
        warnings.warn(
            f"the noise levels begin at {float(sigmas[0]):g}, above {denoiser.sigma_max:g}, the highest of the model: "
            "it was not trained there",
            stacklevel=2,
        )
    return sigmas


def plan(
    model: Denoiser,
    *,
    w: float | None = None,
    solver: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    start: float | Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose the denoiser, solver, noise levels and start to sample `model` with.

    Args:
        model: from `load_denoiser`.
        w: guidance weight; None leaves the model as it is.
        solver: options of `make_solver`, "euler" by default and "flow_map" for a flow map, or `name` "learned" and
            `predictor`, the name or path of a learned solver. A few-step student brings its own sampler.
        schedule: options of `make_schedule`, by default "cosine" down to sigma = 0. Students and learned solvers bring
            their own. "gits" chooses the levels on trajectories of the model.
        num_steps: steps of the schedule; students and learned solvers have only their own.
        start: the level to begin at by the analytic start, or a mapping of this `sigma` and, where they are not those
            stored beside the model, `statistics` (of `load_gaussian`). Students and learned solvers bring their own.
        guidance: options of `make_guidance_weight`, in place of w, for a weight that depends on the noise level.

    Raises:
        ValueError: both w and guidance; a number of steps that a student or a learned solver was not trained for, a
            denoiser or a weight that a learned solver was not trained for, no number of steps where one is needed, or a
            start outside the range of the model or without statistics of its data.
        TypeError: an entry that a start does not have.
    """
    if guidance is not None:
        if w is not None:
            raise ValueError(f"guidance has a weight of its own: leave out w={w:g}")
        made = plan(model, w=0.0, solver=solver, schedule=schedule, num_steps=num_steps, start=start)
        return replace(made, guidance=make_guidance_weight(**{"sigmas": made.sigmas, **guidance}))
    denoiser = model if w is None else guided(model, w)
    solver_options = solver or {"name": "flow_map" if model.flow_map else "euler"}
    learned = solver_options["name"] == "learned"
    _check_fit(model, learned=learned, solver=solver, schedule=schedule, num_steps=num_steps, start=start)
    if model.distilled is not None:
        return _student_plan(denoiser, model.distilled, num_steps)
    if learned:
        return _learned_plan(denoiser, solver_options["predictor"], num_steps)
    begin = None if start is None else start_for(model, start)
    grid = {"num_steps": num_steps, **(schedule or {"name": "cosine", "sigma_min": 0.0})}
    return _scheduled_plan(denoiser, solver_options, grid, begin)


def _check_fit(
    model: Denoiser,
    *,
    learned: bool,
    solver: Mapping[str, Any] | None,
    schedule: Mapping[str, Any] | None,
    num_steps: int | None,
    start: float | Mapping[str, Any] | None,
) -> None:
    """Refuse what students and learned solvers bring themselves, and a missing number of steps elsewhere."""
    own = model.distilled
    if own is not None and own.sampler == "encoder":
        raise ValueError("this student carries images to noise, not noise to images: editing encodes with it")
    if own is not None:
        own.levels(num_steps)
    if own is not None and any(option is not None for option in (solver, schedule, start)):
        raise ValueError(
            "a few-step student brings its own sampler and noise levels: leave out solver, schedule and start"
        )
    if solver is not None and solver["name"] == "flow_map" and not model.flow_map:
        raise ValueError("solver=flow_map is for flow maps, and this model is none: it takes no end of a step")
    if learned and (schedule is not None or start is not None):
        raise ValueError("a learned solver brings its own noise levels: leave out schedule and start")
    if num_steps is None and own is None and not learned:
        raise ValueError("num_steps is missing: this model was not distilled to a number of steps, so choose one")


def _student_plan(denoiser: Denoiser, own: Distilled, num_steps: int | None) -> Plan:
    levels = torch.tensor(own.levels(num_steps), dtype=torch.float64)
    if own.sampler == "stochastic":
        return Plan(denoiser, StochasticEuler(), levels)
    return Plan(denoiser, FlowMap(afs=own.afs) if denoiser.flow_map else Euler(afs=own.afs), levels)


def _learned_plan(denoiser: Denoiser, predictor: str, num_steps: int | None) -> Plan:
    device = device_of(denoiser)
    learned = load_predictor(predictor, device=device)
    learned.check(denoiser, num_steps=num_steps)
    start = learned.gaussian_start(device=device)
    return Plan(denoiser, learned.solver, learned.sigmas, start, learned.thresholding)


def _scheduled_plan(
    denoiser: Denoiser, solver: Mapping[str, Any], grid: dict[str, Any], start: GaussianStart | None
) -> Plan:
    if start is not None and grid.setdefault("sigma_max", start.sigma) != start.sigma:
        raise ValueError(f"a start at sigma = {start.sigma:g} is where the schedule begins: leave out its sigma_max")
    sigmas, spent = _gits(denoiser, grid, start) if grid["name"] == "gits" else (schedule_for(denoiser, grid), 0)
    return Plan(denoiser, make_solver(**solver), sigmas, start, preparation_nfe=spent)


def start_for(model: Denoiser, start: float | Mapping[str, Any]) -> GaussianStart:
    """The analytic start of `plan` for a model, checked."""
    options: dict[str, Any] = dict(start) if isinstance(start, Mapping) else {"sigma": start}
    wrong = next((name for name in options if name not in ("sigma", "statistics")), None)
    sigma, given = options.get("sigma"), options.get("statistics")
    if wrong is not None or not isinstance(sigma, (int, float)) or isinstance(sigma, bool):
        raise TypeError(f"a start is a noise level, or sigma and statistics, but is {start!r}")
    if not model.sigma_min < sigma <= model.sigma_max:
        raise ValueError(
            f"a start at sigma = {sigma:g} is not in the range of the model, {model.sigma_min:g} to {model.sigma_max:g}"
        )
    if given is None:
        given = statistics_of(model.source or "model")
        if given not in shipped_gaussians() and not Path(given).is_file():
            raise ValueError(
                f"an analytic start needs statistics of the model's data, but there is no {given!r}: make them with "
                "diffdistill gaussian-stats, or name others by start.statistics"
            )
    statistics = load_gaussian(given, device=device_of(model))
    if statistics.data_shape != tuple(model.data_shape) or len({0, statistics.num_classes, model.num_classes}) > 2:
        raise ValueError(
            f"the statistics {str(given)!r} are of {list(statistics.data_shape)} in {statistics.num_classes} classes, "
            f"but the model makes {list(model.data_shape)} in {model.num_classes}"
        )
    return GaussianStart(statistics, sigma)


def statistics_of(model: str) -> str:
    """The statistics of the data of a model, by its name or file: those shipped, or `NAME.statistics.safetensors`."""
    path = Path(model, "model") if Path(model).is_dir() else Path(model)
    return model if model in shipped_gaussians() else str(path.with_name(f"{path.stem}.statistics.safetensors"))


def sampling_inputs(settings: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files that sampling reads, as `Run` takes them: those named, and the statistics beside a model."""
    found, start = inputs_of(settings), settings.get("start")
    if start is not None and "start.statistics" not in found:
        found |= inputs_of({"statistics": statistics_of(settings["model"])})
    return found


def _gits(denoiser: Denoiser, options: Mapping[str, Any], start: GaussianStart | None) -> tuple[Tensor, int]:
    """The levels that GITS chooses, and the evaluations it takes: one for each step of the fine runs."""
    device, fine_steps = device_of(denoiser), options.get("fine_steps", WARM_UP_STEPS)
    labels = spread_labels(WARM_UP_SAMPLES, denoiser.num_classes)
    runs = {
        "denoiser": denoiser,
        "noise": seeded_noise(range(WARM_UP_SEED, WARM_UP_SEED + WARM_UP_SAMPLES), denoiser.data_shape, device=device),
        "cond": None if labels is None else labels.to(device),
        "start": start,
        "fine_steps": fine_steps,
    }
    return schedule_for(denoiser, {**options, **runs}), WARM_UP_SAMPLES * fine_steps * denoiser.cost
