"""Where a run of a scheduler is: the config and the levels of the stock scheduler, and the timesteps of a solver."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.scheduler_plan import Move, Visit, halted, moves_of, visits_of
from diffdistill.interop.diffusers.scheduler_sources import Source, class_of, read_source, to_flow
from diffdistill.solvers import Solver, make_schedule
from diffdistill.solvers.schedules import OF_A_TABLE

diffusers()  # so that a missing extra is named here
from diffusers.configuration_utils import ConfigMixin, FrozenDict  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402

AFS = "an analytical first step has no place in image-to-image, which begins at a timestep: set afs=False"
OWN = ("solver", "schedule", "sigmas", "source", "inverse")
"""The settings of `SolverScheduler` beside those of the stock scheduler."""


class Timetable(SchedulerMixin, ConfigMixin):
    """What a `SolverScheduler` says of its run, apart from the state: config, levels, timesteps, and added noise.

    Attributes:
        solver: by which the timesteps are chosen.
        timesteps: one for each evaluation.
        sigmas: the level of each evaluation, and the last, as the stock scheduler holds them.
        num_inference_steps: the number of steps.
    """

    config_name = "scheduler_config.json"
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers declares it so)
    config: Any
    solver: Solver
    timesteps: Tensor
    _origin: Source
    _levels: list[float]
    _moves: list[Move]
    _visits: list[Visit]

    def _adopt(self, stock: Any, **own: Any) -> None:
        """Take over the settings of a stock scheduler, and keep our own beside them."""
        self.register_to_config(**{**stock.config, **own})
        self._origin, self._origin_config = read_source(stock), self.config

    def _reset(self) -> None:
        """Before the first evaluation."""
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._coefficients: dict[float, tuple[float, float, float]] = {}

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **changes: Any) -> Any:
        """Make one from the config of another, or from that of a stock scheduler; `changes` replace settings.

        Raises:
            ValueError: the config is of no known scheduler.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"from_config takes the config of a scheduler, not {config!r}")
        # Settings that were left at their defaults are those of the class that is made, unless they are changed here.
        unset = [name for name in config.get("_use_default_values", ()) if name not in changes]
        given = {**config, **changes, "_use_default_values": unset}
        own = {name: given.pop(name) for name in (*OWN, "source_config") if name in given}
        given = {**(own.pop("source_config", None) or {}), **given}
        if getattr(diffusers(), str(given.get("_class_name")), None) is None:
            given.pop("_class_name", None)  # that of ours
        named = "_class_name" in given or "source" not in own
        source = class_of(given) if named else own["source"]
        settings = {name: value for name, value in given.items() if name != "_class_name"}
        made = cls(**{**own, "source": source, "source_config": settings})
        return (made, {}) if return_unused_kwargs else made

    @property
    def _source(self) -> Source:
        """The stock scheduler, read again where a pipeline has replaced settings of the config."""
        if self.config is not self._origin_config:
            stock = self._origin.scheduler
            mine = {name: value for name, value in self.config.items() if name not in OWN and name != "_class_name"}
            if any(stock.config.get(name) != value for name, value in mine.items()):
                self._origin = read_source(type(stock).from_config(mine))
            self._origin_config = self.config
        return self._origin

    @property
    def source(self) -> Any:
        """The stock scheduler that this one stands in for."""
        return self._source.scheduler

    @property
    def alphas_cumprod(self) -> Tensor:
        """Of the stock scheduler; an AttributeError where it has none."""
        return self.source.alphas_cumprod

    @property
    def betas(self) -> Tensor:
        """Of the stock scheduler; an AttributeError where it has none."""
        return self.source.betas

    @property
    def step_index(self) -> int | None:
        """The evaluation that comes next, counted from 0; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where `set_begin_index` says that the run begins."""
        return self._begin_index

    @property
    def order(self) -> int:
        """By what pipelines multiply a number of steps to count timesteps.

        Where they chose the levels themselves they count evaluations already.
        """
        return 1 if self._custom else self.solver.stages

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply noise by to begin."""
        return self._source.start(self._levels[0])

    @property
    def noise_levels(self) -> Tensor:
        """The levels of the steps in the package's sense, for `sample`: float64 `[num_inference_steps + 1]`."""
        return torch.tensor(self._levels, dtype=torch.float64)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> None:
        """Choose the noise levels: those given here, those of the config, or those that the stock scheduler chooses.

        Args:
            num_inference_steps: the number of steps.
            device: of the timesteps.
            timesteps: those of the steps, in place of a number.
            sigmas: the levels of the steps in the stock scheduler's sense, in place of a number.
            options: others that the stock scheduler's `set_timesteps` takes.

        Raises:
            ValueError: another number of steps than the config's noise levels have, or levels that repeat.
            TypeError: an option that the stock scheduler does not have.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: [float(v) for v in values] for name, values in given.items() if values is not None}
        if len(given) > 1:
            raise ValueError("give timesteps or sigmas, not both")
        self._custom = bool(given)
        levels, times = self._choose(num_inference_steps, given, options)
        if self.config.inverse:
            low = self._source.ends["sigma_min"]
            levels = [max(level, low) if i == 0 else level for i, level in enumerate(levels[::-1])]
            times = [self._source.time(level) for level in levels[:-1]]
        self._levels, self.num_inference_steps = levels, len(levels) - 1
        self._moves = moves_of(levels, self.solver, self._source.noise_alone)
        self._visits = visits_of(self._moves, self.solver, dict(zip(levels, times, strict=False)), self._source.time)
        listed = torch.tensor([visit.time for visit in self._visits], dtype=torch.float64)
        whole = all(visit.exact and isinstance(visit.time, int) for visit in self._visits)
        dtype = torch.int64 if whole else torch.float32
        self.timesteps = listed.to(dtype).to(device or "cpu")
        self.sigmas = torch.tensor([self._public(level) for level in (*(v.sigma for v in self._visits), levels[-1])])
        self._reset()

    def _choose(
        self, count: int | None, given: Mapping[str, Sequence[float]], options: Mapping[str, Any]
    ) -> tuple[list[float], list[float]]:
        """Levels `[N + 1]` and timesteps `[N]`."""
        source, config = self._source, self.config
        if given or (config.sigmas is None and config.schedule is None):
            levels, times = source.levels(num_inference_steps=None if given else count, **given, **options)
            return self._decreasing(levels), times
        if options:
            raise TypeError(f"set_timesteps takes no {', '.join(options)}: this scheduler has levels of its own")
        if config.sigmas is not None:
            levels = make_schedule(config.sigmas).tolist()
            if count not in (None, len(levels) - 1):
                raise ValueError(f"num_inference_steps={count}: these noise levels have {len(levels) - 1} steps")
        else:
            levels = self._scheduled(dict(config.schedule), count)
        return levels, [source.time(level) for level in levels[:-1]]

    def _scheduled(self, options: dict[str, Any], count: int | None) -> list[float]:
        ends = self._source.ends
        table = ends.pop("table", None)
        name = options["name"]
        if name in OF_A_TABLE and table is not None:
            ends["table"] = table
        if name in ("trailing", "flow"):
            ends["sigma_min"] = 0.0
        return make_schedule(num_steps=count, **{**ends, **options}).tolist()

    @staticmethod
    def _decreasing(levels: list[float]) -> list[float]:
        """Levels that decrease; the last may be there twice, where a config ends at the lowest level itself."""
        for i, (level, below) in enumerate(itertools.pairwise(levels)):
            if not (level > below or (level == below and i + 2 == len(levels))):
                raise ValueError(
                    f"noise levels must decrease, but step {i} of {len(levels) - 1} goes from {level:.6g} to "
                    f"{below:.6g}: take fewer steps, or a schedule of another name"
                )
        return levels

    def _public(self, sigma: float) -> float:
        """A noise level as the `sigmas` of the stock scheduler hold it."""
        return to_flow(sigma) if self._source.flow else sigma

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this evaluation, as image-to-image pipelines do.

        Where it is not the first of a step, the run begins with the step from which the evaluations left suffice;
        `timesteps` are changed from there on, and evaluations that are left over change nothing.

        Raises:
            ValueError: too few evaluations are left for a step, or the solver takes an analytical first step.
        """
        if begin_index and self.solver.afs:
            raise ValueError(AFS)
        firsts = {visit.move: i for i, visit in reversed(list(enumerate(self._visits)))}
        if begin_index not in firsts.values():
            left = len(self._visits) - begin_index
            move = min((m for m, first in firsts.items() if len(self._visits) - first <= left), default=None)
            if move is None:
                raise ValueError(
                    f"begin_index={begin_index}: steps begin at {sorted(firsts.values())}, and a strength below 1 / "
                    f"{self.num_inference_steps} leaves none"
                )
            self._pad(begin_index, move, left - (len(self._visits) - firsts[move]))
        self._begin_index, self._step_index = begin_index, None

    def _pad(self, index: int, move: int, spare: int) -> None:
        """Let evaluation `index` be the first of `spare` that change nothing, before this move."""
        first = next(visit for visit in self._visits if visit.move == move)
        still = [replace(first, move=move + i) for i in range(spare)]
        rest = [replace(visit, move=visit.move + spare) for visit in self._visits if visit.move >= move]
        self._visits = [*self._visits[:index], *still, *rest]
        self._moves = [*self._moves[:move], *[halted(self._moves[move])] * spare, *self._moves[move:]]
        for i in range(index, len(self._visits)):  # in place: the pipeline may hold views of this tensor
            self.timesteps[i] = self._visits[i].time

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The evaluation of a timestep: the first of a step where several have the same.

        Raises:
            ValueError: it is none of the schedule.
        """
        place = self._view(timestep)
        if place is not None and schedule_timesteps is None:
            return place
        time = number(timestep)
        listed = [visit.time for visit in self._visits] if schedule_timesteps is None else schedule_timesteps.tolist()
        found = [i for i, known in enumerate(listed) if same(known, time)]
        if not found:
            known = ", ".join(f"{time:g}" for time in listed)
            raise ValueError(f"timestep {time:g} is none of this schedule: {known}")
        begins = [i for i in found if schedule_timesteps is None and self._begins(i)]
        return (begins or found[1:] or found)[0]

    def _begins(self, index: int) -> bool:
        return index == 0 or self._visits[index].move != self._visits[index - 1].move

    def _view(self, timestep: Any) -> int | None:
        """Where `timestep` lies in `timesteps`, if it is a view of it, without reading it from its device."""
        own = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.numel() != 1 or timestep.dtype != own.dtype:
            return None
        storage = timestep.untyped_storage().data_ptr()
        inside = storage and storage == own.untyped_storage().data_ptr()
        return int(timestep.storage_offset() - own.storage_offset()) if inside else None

    def _is_next(self, timestep: Any, index: int) -> bool:
        if index >= len(self._visits):
            return False
        place = self._view(timestep)
        if timestep is None or place == index:
            return True
        return place is None and same(self._visits[index].time, number(timestep))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents of `x0 + sigma noise` at timesteps `[B]` or `[1]`.

        Raises:
            ValueError: a timestep without a noise level; the first, if the solver takes an analytical first step, which
                comes before it.
        """
        times = torch.as_tensor(timesteps).reshape(-1)
        if self.solver.afs and bool((times.cpu() == self.timesteps[0].cpu()).any()):
            raise ValueError(AFS)
        levels = [self._level_of(time) for time in times.tolist()]
        scales = [self._scale(level) for level in levels]
        if len(set(levels)) == 1:
            return scales[0] * original_samples + (scales[0] * levels[0]) * noise
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        scale = torch.tensor(scales).view(shape).to(original_samples)
        spread = torch.tensor([s * level for s, level in zip(scales, levels, strict=True)]).view(shape)
        return scale * original_samples + spread.to(original_samples) * noise

    def _level_of(self, time: float) -> float:
        visit = next((visit for visit in self._visits if same(visit.time, time)), None)
        if visit is None:
            return self._source.sigma(time)
        return visit.sigma if self._step_index is None else visit.given

    def __len__(self) -> int:
        return len(self.timesteps)

    def _at(self, level: float) -> tuple[float, float, float]:
        """`c_skip`, `c_out` and `c_in`."""
        known = self._coefficients.get(level)
        if known is None:
            sigma, network = torch.tensor([level], dtype=torch.float64), self._source.preconditioning
            known = float(network.c_skip(sigma)), float(network.c_out(sigma)), float(network.c_in(sigma))
            self._coefficients[level] = known
        return known

    def _scale(self, level: float) -> float:
        """What latents are over x."""
        return self._at(level)[2] if self._source.scaled else 1.0


def number(timestep: Any) -> float:
    """The value of a timestep, or of the first of several."""
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def same(known: float, other: float) -> bool:
    """Whether two numbers are one, in float32."""
    return abs(known - other) <= 1e-5 * max(1.0, abs(known))


__all__ = ["AFS", "OWN", "FrozenDict", "SchedulerMixin", "Timetable", "number", "same"]
