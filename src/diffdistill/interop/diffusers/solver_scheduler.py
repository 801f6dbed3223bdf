"""Any solver of the toolbox inside the stock pipelines of diffusers, as a scheduler of theirs.

A pipeline gives a scheduler one evaluation at a time and owns the loop; a solver's step asks for the evaluations that
it needs. Since a step is a pure function, it is run again from its start with the answers that are known so far, until
it asks for one that is not: that is what the pipeline evaluates next. What is run again is arithmetic on latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.discrete_time import interpolate
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.levels import levels_of, sigma_table
from diffdistill.models.preconditioning import Preconditioning, make_preconditioning
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import (
    EDMStochastic,
    Evaluation,
    FeatureTap,
    ProbabilityFlow,
    Solver,
    intervals,
    make_schedule,
    make_solver,
)
from diffdistill.solvers.levels import Level, on_batch

diffusers()  # so that a missing extra is named here
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

AFS = "an analytical first step has no place in image-to-image, which begins at a timestep: set afs=False"


class _Ask(Exception):
    """The evaluation that a step needs next: at `x`, with the noise level `given: [B]` for the network."""

    def __init__(self, x: Tensor, sigma: Tensor, given: Tensor) -> None:
        super().__init__("an evaluation is needed")
        self.x, self.sigma, self.given = x, sigma, given


class _Replay(ProbabilityFlow):
    """A flow that knows some answers, in order, and asks for the next."""

    def __init__(self, answers: Sequence[Evaluation]) -> None:
        super().__init__(lambda x, sigma, cond: x)
        self.answers = iter(answers)

    def __call__(self, x: Tensor, sigma: Level, *, scale_time: Tensor | None = None) -> Evaluation:
        known = next(self.answers, None)
        if known is None:
            sigma = on_batch(sigma, x)
            raise _Ask(x, sigma, sigma if scale_time is None else sigma * scale_time)
        return known


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a run is: in a step that began at `start`, with the answers so far, and what it asks for."""

    step: int
    start: Tensor | None = None
    history: Any = ()
    answers: tuple[Evaluation, ...] = ()
    ask: _Ask | None = None


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A solver with its noise levels, in place of a pipeline's scheduler: `pipeline.scheduler = scheduler_for(...)`.

    Latents are those of the package, `x = x0 + sigma n`. Every evaluation of the solver is a timestep of the pipeline,
    so that a solver of two stages makes about twice as many as `num_inference_steps`.

    Args:
        solver: options of `make_solver` with `name`; or `{"name": "stochastic"}`, the stochastic N-step sampler.
        schedule: options of `make_schedule` with `name`, without the ends and the number of steps.
        sigmas: the noise levels themselves, such as those of a few-step student, in place of `schedule`.
        source: the class of the pipeline's own scheduler, which says what the network predicts at which noise levels.
        source_config: its config.
    """

    config_name = "scheduler_config.json"
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers declares it so)
    config: Any

    @register_to_config
    def __init__(
        self,
        *,
        solver: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        sigmas: Sequence[float] | None = None,
        source: str = "DDIMScheduler",
        source_config: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(solver or {"name": "euler"})
        stochastic = options.get("name") == "stochastic"
        self.solver = self.usable(StochasticEuler() if stochastic else make_solver(**options))
        self.source: Any = getattr(diffusers(), source).from_config(dict(source_config or {}))
        self.levels = levels_of(self.source)
        self.preconditioning: Preconditioning = make_preconditioning(**self.levels.preconditioning)
        self.table = sigma_table(self.source) if "table" in self.levels.preconditioning else None
        self.features: FeatureTap | None = None
        self.set_timesteps(len(sigmas) - 1 if sigmas is not None else 10)

    @staticmethod
    def usable(solver: Solver) -> Solver:
        """The solver, if a stock pipeline has a place for what it does.

        Raises:
            ValueError: it does what one has no place for.
        """
        if isinstance(solver, EDMStochastic):
            raise ValueError(
                "edm_sde adds its noise before it asks the network, for which stock pipelines have no place"
            )
        if solver.stochastic and solver.afs:
            raise ValueError("a stochastic solver takes no analytical first step in a stock pipeline: set afs=False")
        return solver

    @property
    def order(self) -> int:
        """Evaluations of a step, by which image-to-image pipelines find the step to begin with."""
        return self.solver.stages

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply noise by to begin."""
        return float(self.sigmas[0])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the noise levels: those given here, those of the config, or `num_inference_steps` of the schedule.

        Raises:
            ValueError: another number of steps than the config's noise levels have.
        """
        own = self.config.sigmas if sigmas is None else sigmas
        if own is not None:
            self.sigmas = make_schedule(own)
            if num_inference_steps not in (None, len(self.sigmas) - 1):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}: these noise levels have {len(self.sigmas) - 1} steps"
                )
        else:
            options = dict(self.config.schedule or {"name": "trailing"})
            ends: dict[str, Any] = {"sigma_min": self.levels.sigma_min, "sigma_max": self.levels.sigma_max}
            if options["name"] in ("trailing", "discrete") and self.table is not None:
                ends["table"] = self.table
            if options["name"] in ("trailing", "flow"):
                ends["sigma_min"] = 0.0
            self.sigmas = make_schedule(num_steps=num_inference_steps, **{**ends, **options})
        self.num_inference_steps = len(self.sigmas) - 1
        steps = intervals(self.sigmas, 1)
        skipped = int(bool(self.solver.afs))
        counts = [1 if step.to_zero else self.solver.stages for step in steps]
        counts[0] -= skipped
        self._firsts = [sum(counts[:i]) for i in range(len(counts))]
        # The places of later stages are known once they are reached; until then they stand at the geometric mean.
        times = [
            self._time(step.sigma if stage + (skipped and i == 0) == 0 else (step.sigma * step.sigma_next).sqrt())
            for i, (step, count) in enumerate(zip(steps, counts, strict=True))
            for stage in range(count)
        ]
        self.timesteps = torch.cat(times).to(torch.float32).to(device or "cpu")
        self._restart(0, 0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at an evaluation that is the first of a step: where image-to-image pipelines do.

        Raises:
            ValueError: no step begins there, or the solver takes an analytical first step.
        """
        if begin_index and self.solver.afs:
            raise ValueError(AFS)
        if begin_index not in self._firsts:
            raise ValueError(
                f"begin_index={begin_index}: steps begin at {self._firsts}, and a strength below 1 / "
                f"{self.num_inference_steps} leaves none"
            )
        self._restart(self._firsts.index(begin_index), begin_index)

    def _restart(self, step: int, evaluations: int) -> None:
        self._evaluations = evaluations
        self._place: _Place = _Place(step)

    def _time(self, sigma: Tensor) -> Tensor:
        return self.preconditioning.c_noise(sigma.detach().cpu().double())

    def _given(self, ask: _Ask) -> Tensor:
        """The noise level for the network, one for the batch, as a vector of length 1 on the CPU.

        Raises:
            ValueError: a learned solver that gives the images of a batch different noise levels.
        """
        given = ask.given.detach().cpu().double()
        if not torch.allclose(given, given[:1], rtol=1e-6, atol=0):
            raise ValueError(
                "this learned solver gives every image a noise level of its own, but a stock pipeline has one for the "
                "batch: draw one image at a time"
            )
        return given[:1]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given for `sample`, which guidance may have doubled along the batch."""
        ask = self._next(sample).ask
        assert ask is not None
        given = self._given(ask)
        # In place: the pipeline iterates over views of this tensor, so that it sees the place of a learned stage.
        self.timesteps[self._evaluations] = float(self._time(given))
        return per_sample(self.preconditioning.c_in(given).to(sample.device).expand(len(ask.x)), ask.x) * ask.x

    def _next(self, sample: Tensor) -> _Place:
        """Where the next evaluation is made; pipelines may have changed `sample` since the last one."""
        place = self._place
        if place.ask is not None:
            count = len(sample) // len(place.ask.sigma)
            return replace(place, ask=_Ask(sample, place.ask.sigma.repeat(count), place.ask.given.repeat(count)))
        place = replace(place, start=sample)
        # A loop, because an analytical first step asks for nothing.
        while place.ask is None:
            if place.step == self.num_inference_steps:
                raise ValueError("the schedule is at its end: call set_timesteps before another run")
            # Zeros in place of noise: the step stops before it uses them.
            place = self._advance(place, torch.zeros_like(sample) if self.solver.stochastic else None)
        return place

    def _advance(self, place: _Place, noise: Tensor | None) -> _Place:
        """Run a step of the solver with the answers there are: to what it asks for, or to the next step."""
        assert place.start is not None
        interval = intervals(self.sigmas, len(place.start), place.start.device)[place.step]
        try:
            x, history = self.solver.step(_Replay(place.answers), place.start, interval, place.history, noise=noise)
        except _Ask as ask:
            return replace(place, ask=ask)
        return _Place(place.step + 1, x, history)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the network's answer at `sample`, and return where the next evaluation or the next step begins."""
        dtype, sample = sample.dtype, self._entered(sample)
        place = self._next(sample)
        assert place.ask is not None
        answers = (*place.answers, self._evaluation(model_output, place.ask))
        noise = None
        if self.solver.stochastic:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        self._place = self._advance(replace(place, answers=answers, ask=None), noise)
        self._evaluations += 1
        x = self._place.start if self._place.ask is None else self._place.ask.x
        assert x is not None
        x = self._left(x).to(dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _entered(self, sample: Tensor) -> Tensor:
        """A pipeline's latents as the state of the solver."""
        return sample

    def _left(self, x: Tensor) -> Tensor:
        """The state of the solver, after a step has been taken, as a pipeline's latents."""
        return x

    def _evaluation(self, model_output: Tensor, ask: _Ask) -> Evaluation:
        """The network's answer as one of the denoiser."""
        given = self._given(ask).to(ask.x.device).expand(len(ask.x))
        skip, out = self.preconditioning.c_skip(given), self.preconditioning.c_out(given)
        denoised = per_sample(skip, ask.x) * ask.x + per_sample(out, ask.x) * model_output[:, : ask.x.shape[1]]
        features = None if self.features is None else self.features()
        # Under guidance stock pipelines put the conditional half last.
        return Evaluation(ask.x, ask.sigma, denoised, None if features is None else features[-len(ask.x) :])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x0 + sigma noise` at timesteps `[B]` or `[1]`.

        Raises:
            ValueError: at the first timestep, if the solver takes an analytical first step, which comes before it.
        """
        if self.solver.afs and bool((torch.as_tensor(timesteps).cpu() == self.timesteps[0].cpu()).any()):
            raise ValueError(AFS)
        sigma = self._sigma_at(torch.as_tensor(timesteps).reshape(-1).cpu().double()).to(original_samples.device)
        return original_samples + per_sample(sigma.expand(len(original_samples)), noise) * noise

    def _sigma_at(self, times: Tensor) -> Tensor:
        assert self.table is not None
        places = torch.arange(len(self.table), dtype=torch.float64)
        return interpolate(times, places, self.table.log()).exp()

    def __len__(self) -> int:
        return len(self.timesteps)


__all__ = ["FrozenDict", "SchedulerMixin", "SolverScheduler"]
