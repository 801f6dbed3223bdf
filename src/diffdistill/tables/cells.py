"""Measuring one cell of a table: sample, extract features, compare; and the small file that keeps the result."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffdistill.distributed as distributed
from diffdistill.denoiser import Denoiser, spread_labels
from diffdistill.files.atomic import write_text
from diffdistill.learned import load_predictor
from diffdistill.metrics.collect import Collected, collect
from diffdistill.metrics.features import Features
from diffdistill.metrics.measures import Measured, measure, needed
from diffdistill.metrics.reference import Reference
from diffdistill.metrics.sources import Sampler
from diffdistill.models import guided
from diffdistill.models.acceleration import accelerated
from diffdistill.models.loading import load_denoiser
from diffdistill.reports.pictures import save_grid
from diffdistill.sampling.generation import count_nfe
from diffdistill.sampling.plans import Plan, plan
from diffdistill.solvers import seeded_noise
from diffdistill.tables.tables import Cell, Table

GRID_IMAGES = 40
GRID_COLUMNS = 10


@dataclass(frozen=True)
class Prepared:
    """A cell ready to be sampled.

    Attributes:
        plan: how.
        training: what training the learned parts took: by file, the command, updates and seconds.
    """

    plan: Plan
    training: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """What was measured of a cell; the content of its file.

    Attributes:
        row, column: the cell.
        digest: of everything that decides the result.
        measures: by name.
        num_samples: behind them.
        nfe: network evaluations of one sample, as counted; a guided evaluation counts twice.
        num_steps: steps of the schedule.
        seconds_per_image: time of drawing, summed over processes; features and measures not included.
        preparation_nfe: evaluations that choosing the schedule took.
        training: as of `Prepared`.
        hardware, versions: what it ran on.
    """

    row: str
    column: float
    digest: str
    measures: Mapping[str, Measured]
    num_samples: int
    nfe: int
    num_steps: int
    seconds_per_image: float
    preparation_nfe: int
    training: Mapping[str, Mapping[str, Any]]
    hardware: str
    versions: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """The result in a file, or None where there is no whole one."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            measures = {name: Measured(**value) for name, value in record.pop("measures").items()}
            return cls(**record, measures=measures)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


class Models:
    """Loads denoisers, keeping the last one, as neighbouring cells share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._name, self._model = "", Denoiser()

    def load(self, name: str) -> Denoiser:
        if name != self._name:
            self._name, self._model = name, load_denoiser(name, device=self.device)
        return self._model


def prepare(cell: Cell, models: Models) -> Prepared:
    """Load what a cell needs and say how to sample it.

    Raises:
        ValueError: files that do not fit each other, or settings out of range.
    """
    model = models.load(cell.model)
    training = {cell.model: trained((model.config or {}).get("provenance"))}
    # w = 0 guides nothing: a model that does not take w as an input needs no second evaluation for it.
    w = None if cell.w == 0 and model.w_range is None else cell.w
    solver, schedule = cell.solver, cell.schedule
    if cell.predictor is not None:
        solver, schedule = {"name": "learned", "predictor": cell.predictor}, None
        training[cell.predictor] = trained(load_predictor(cell.predictor).provenance)
    elif model.distilled is not None:
        schedule = None  # a student brings its own levels
    planned = plan(model, w=w, solver=solver, schedule=schedule, num_steps=cell.num_steps, start=cell.start)
    return Prepared(planned, {name: record for name, record in training.items() if record})


def count_evaluations(table: Table, cell: Cell, planned: Plan) -> int:
    """Network evaluations of one sample of a cell.

    Raises:
        ValueError: a column of evaluations is not what the run takes.
    """
    nfe = count_nfe(planned)
    if table.column == "nfe" and nfe != cell.column:
        raise ValueError(
            f"row {cell.row!r}: a run of {planned.num_steps} steps takes {nfe} evaluations, "
            f"not the {cell.column:g} of its column"
        )
    return nfe


def trained(provenance: Any) -> dict[str, Any]:
    """What a file records of its training: command, updates, seconds."""
    provenance = provenance if isinstance(provenance, Mapping) else {}
    metrics = provenance.get("metrics") if isinstance(provenance.get("metrics"), Mapping) else {}
    found = {"command": provenance.get("command"), "updates": metrics.get("update"), "seconds": metrics.get("seconds")}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class CellEvaluator:
    """Samples and measures the cells of a table.

    Attributes:
        features: the extractor.
        reference: the real images.
        models: loads denoisers onto the device.
        batch_size: of sampling.
        save_samples: keep the samples of each cell as an npz.
        switches: those of `acceleration.accelerated`, which change samples by rounding only.
    """

    features: Features
    reference: Reference
    models: Models
    batch_size: int = 256
    save_samples: bool = False
    switches: Mapping[str, bool] = field(default_factory=dict)

    def measure(self, table: Table, cell: Cell, folder: Path, digest: str, on_images: Callable[[int], None]) -> Result:
        """Sample and measure a cell, and write its grid (and samples) to `folder`. Every process draws its share.

        Raises:
            ValueError: a column of evaluations is not what the run takes.
        """
        prepared = prepare(cell, self.models)
        nfe = count_evaluations(table, cell, prepared.plan)
        planned = replace(prepared.plan, denoiser=accelerated(prepared.plan.denoiser, **self.switches))
        drawn: list[Tensor] = []

        def watch(start: int, x: Tensor) -> None:
            if self.save_samples or start < GRID_IMAGES:
                drawn.append(x.float().clamp(-1, 1).cpu())
            on_images(len(x))

        sampler = Sampler(planned, table.num_samples, seed=table.seed, on_images=watch)
        collected = collect(
            sampler,
            self.features,
            keep=needed(table.measures),
            splits=table.splits,
            batch_size=self.batch_size,
            device=self.models.device,
        )
        seconds = sum(distributed.gather(sampler.seconds))
        self._save(drawn, collected, folder, cell)
        return Result(
            row=cell.row,
            column=cell.column,
            digest=digest,
            measures=measure(collected, self.reference, self.features, table.measures),
            num_samples=table.num_samples,
            nfe=nfe,
            num_steps=prepared.plan.num_steps,
            seconds_per_image=seconds / table.num_samples,
            preparation_nfe=prepared.plan.preparation_nfe,
            training=prepared.training,
            hardware=hardware(self.models.device),
            versions=versions(),
        )

    def _save(self, drawn: list[Tensor], collected: Collected, folder: Path, cell: Cell) -> None:
        parts = distributed.gather(drawn) if self.save_samples else [drawn]
        if distributed.rank() != 0:
            return
        x = torch.cat([part for parts_of_one in parts for part in parts_of_one])
        save_grid(x[:GRID_IMAGES], folder / f"{cell.slug}.png", columns=GRID_COLUMNS, scale=max(1, 16 // x.shape[-1]))
        if self.save_samples:
            from diffdistill.sampling.samples import Samples, save_npz

            labels = torch.full((len(x),), -1) if collected.labels is None else collected.labels
            save_npz(Samples(x, labels), folder / cell.slug)


def hardware(device: torch.device) -> str:
    """The processor that computes, in words, and how many of it."""
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    names = [platform.processor() or platform.machine()]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")] or names
    threads = distributed.world_size() * torch.get_num_threads()
    return f"{names[0]}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    """Versions that matter to a number."""
    return {
        "diffdistill": metadata.version("diffdistill"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class Clock:
    """Seconds of one network evaluation of one image, measured once for each model."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._seconds: dict[str, float] = {}

    def seconds(self, name: str, batch_size: int) -> float:
        if name not in self._seconds:
            model = self.models.load(name)
            noise = seeded_noise(range(batch_size), model.data_shape, device=self.models.device)
            sigma = torch.full((batch_size,), float(model.sigma_max), dtype=torch.float64, device=noise.device)
            labels = spread_labels(batch_size, model.num_classes)
            cond = None if labels is None else labels.to(noise.device)
            denoiser = model if model.w_range is None else guided(model, model.w_range[0])
            with torch.no_grad():
                denoiser(noise, sigma, cond)
                started = time.perf_counter()
                denoiser(noise, sigma, cond).sum().item()
            self._seconds[name] = (time.perf_counter() - started) / batch_size
        return self._seconds[name]
