"""Any solver of the toolbox inside the stock pipelines of diffusers, as a scheduler of theirs.

A pipeline gives a scheduler one evaluation at a time and owns the loop; a solver's step asks for the evaluations that
it needs. Since a step is a pure function, it is run again from its start with the answers that are known so far, until
it asks for one that is not: that is what the pipeline evaluates next. What is run again is arithmetic on latents.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.scheduler_features import Bottleneck
from diffdistill.interop.diffusers.scheduler_plan import Ask, Replay, advance
from diffdistill.interop.diffusers.scheduler_sources import class_of
from diffdistill.interop.diffusers.scheduler_timetable import AFS, FrozenDict, SchedulerMixin, Timetable, number, same
from diffdistill.progressive.stochastic import StochasticEuler
from diffdistill.solvers import (
    EDMStochastic,
    Euler,
    EulerAncestral,
    Evaluation,
    FlowMap,
    Solver,
    make_solver,
)
from diffdistill.solvers.brownian import BrownianNoise

diffusers()  # so that a missing extra is named here
from diffusers.utils import BaseOutput  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

HALF = (torch.float16, torch.bfloat16)


@dataclass
class SolverSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: latents for the next evaluation.
        pred_original_sample: the image that the network sees in the latents it was given.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a run is: in a move that began at `start`, with the answers so far, and what it asks for."""

    move: int
    start: Tensor | None = None
    history: Any = ()
    answers: tuple[Evaluation, ...] = ()
    ask: Ask | None = None
    noise: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Left:
    """Latents as a pipeline got them, in its dtype, and the state of the solver that they are made of."""

    latents: Tensor
    version: int
    x: Tensor

    def unchanged(self, sample: Tensor) -> bool:
        return sample is self.latents and not sample.is_inference() and sample._version == self.version


class SolverScheduler(Timetable):
    """A solver with its noise levels, in place of a pipeline's scheduler: `pipeline.scheduler = scheduler_for(...)`.

    Latents, timesteps, `sigmas` and the config are those of the stock scheduler that it stands in for. Every evaluation
    of the solver is a timestep of the pipeline, so that a solver of two stages makes about twice as many as
    `num_inference_steps`. Between steps the state is held in float32 at least. A scheduler holds one run: threads
    need one each.

    Args:
        solver: options of `make_solver` with `name`; or `{"name": "stochastic"}`, the stochastic N-step sampler.
        schedule: options of `make_schedule` with `name`, without the ends and the number of steps; None for the levels
            that the stock scheduler chooses.
        sigmas: the noise levels themselves, such as those of a few-step student, in place of `schedule`.
        source: the class of the stock scheduler, which says what the network predicts at which noise levels.
        source_config: its config.
        inverse: encode: run the levels upwards, from images to noise.

    Raises:
        ValueError: a stock scheduler, a solver or a schedule that is not known.
    """

    def __init__(
        self,
        *,
        solver: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        sigmas: Sequence[float] | None = None,
        source: str = "DDIMScheduler",
        source_config: Mapping[str, Any] | None = None,
        inverse: bool = False,
    ) -> None:
        class_of({"_class_name": source})
        stock = getattr(diffusers(), source).from_config(dict(source_config or {}))
        options = dict(solver or {"name": "euler"})
        chosen = None if schedule is None else dict(schedule)
        self._adopt(stock, solver=options, schedule=chosen, sigmas=sigmas, source=source, inverse=inverse)
        self.bottleneck: Bottleneck | None = None
        self.use(StochasticEuler() if options.get("name") == "stochastic" else make_solver(**options))

    def use(self, solver: Solver) -> None:
        """Run this solver from now on; one that was not made from the config is not saved with it."""
        self.solver = self.usable(solver)
        if self.config.inverse and solver.stochastic:
            raise ValueError(f"{type(solver).__name__} is stochastic: it does not encode")
        self.set_timesteps(len(self.config.sigmas) - 1 if self.config.sigmas is not None else 10)

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
        if isinstance(solver, FlowMap):
            raise ValueError("a flow map is told where its step ends, for which stock pipelines have no place")
        if solver.stochastic and solver.afs:
            raise ValueError("a stochastic solver takes no analytical first step in a stock pipeline: set afs=False")
        if solver.afs == "gaussian":
            raise ValueError('afs="gaussian" needs the statistics of the data, for which stock pipelines have no place')
        return solver

    def _reset(self) -> None:
        super()._reset()
        self._place, self._left, self._asked, self._warned = _Place(0), None, False, False
        self._path: BrownianNoise | None = None
        self._level, self._expected = self._levels[0], None
        if self.bottleneck is not None:
            self.bottleneck.listen()

    def _enter(self, timestep: Any) -> None:
        """Be where the pipeline is.

        Raises:
            ValueError: a timestep that is not of the schedule, or not the next of a solver that remembers.
            IndexError: the schedule is at its end.
        """
        index = self._step_index
        if index is None:
            begin = self._begin_index
            if begin is None:
                begin = 0 if timestep is None else self.index_for_timestep(timestep)
            self._begin(begin)
        elif index != self._expected or not self._is_next(timestep, index):
            target = index if index != self._expected else self.index_for_timestep(timestep)
            if self.solver.memory == 0 and self.solver.stages == 1 and target < len(self._visits):
                self._begin(target)
            elif index >= len(self._visits):
                raise IndexError("the schedule is at its end: call set_timesteps before another run")
            else:
                raise ValueError(
                    f"timestep {number(timestep):g} comes out of turn, the next is {self._visits[index].time:g}: "
                    "call set_timesteps or set_begin_index to begin anew, and give every run at the same time a "
                    "scheduler of its own"
                )

    def _begin(self, index: int) -> None:
        """Begin a run at an evaluation.

        Raises:
            ValueError: it is amid a step, at a level at which none begins.
        """
        visit = self._visits[index]
        if not self._begins(index):
            beyond = next((i for i in range(index, len(self._visits)) if self._begins(i)), None)
            if beyond is None or not same(self._visits[beyond].sigma, visit.sigma):
                begins = [i for i in range(len(self._visits)) if self._begins(i)]
                raise ValueError(f"timestep {visit.time:g} is amid a step: steps begin at {begins} of timesteps")
            self._pad(index, self._visits[beyond].move, beyond - index)
            visit = self._visits[index]
        if index and self.solver.afs:
            raise ValueError(AFS)
        self._path: BrownianNoise | None = None
        self._place, self._left = _Place(visit.move if index else 0), None  # an analytical step asks for nothing
        self._step_index = self._expected = index
        self._level = self._levels[0] if index == 0 else visit.sigma

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given for `sample`, which guidance may have doubled along the batch."""
        self._enter(timestep)
        self._asked = True
        if self.bottleneck is not None:
            self.bottleneck.listen()
        x = self._state(sample)
        ask = self._next(x).ask
        assert ask is not None and self._step_index is not None
        self._tell(self._step_index, ask.given)
        into = self._at(ask.given)[2]
        if ask.x is not x:
            return (into * ask.x).to(sample.dtype)
        ratio = into / self._scale(self._level)
        return sample if ratio == 1 else sample * ratio

    def _tell(self, index: int, given: float) -> None:
        """Correct the timestep of an evaluation, whose level only the run could tell."""
        visit = self._visits[index]
        if given != visit.given:
            time = self._source.time(given)
            self._visits[index] = replace(visit, given=given, time=time)
            self.timesteps[index] = time  # in place: the pipeline iterates over views of this tensor

    def _state(self, sample: Tensor) -> Tensor:
        """A pipeline's latents as the state of the solver, in float32 at least.

        In half precision latents are rounded for the pipeline; what it has not changed since goes on unrounded.
        """
        left = self._left
        if left is not None and left.unchanged(sample):
            return left.x
        scale, dtype = self._scale(self._level), torch.promote_types(sample.dtype, torch.float32)
        if left is not None and sample.dtype in HALF and sample.shape == left.latents.shape:
            return left.x + (sample.to(dtype) - left.latents.to(dtype)) / scale
        return sample.to(dtype) / scale

    def _next(self, x: Tensor) -> _Place:
        """Where the next evaluation is made; pipelines may have changed the state `x` since the last one."""
        place = self._place
        if place.ask is not None:
            ask = place.ask
            if len(x) != len(ask.x) and isinstance(ask.sigma, Tensor):
                ask = replace(ask, sigma=ask.sigma.repeat(len(x) // len(ask.x)))
            return replace(place, ask=replace(ask, x=x))
        place = replace(place, start=x)
        # A loop, because an analytical first step asks for nothing.
        while place.ask is None:
            if place.move == len(self._moves):
                raise IndexError("the schedule is at its end: call set_timesteps before another run")
            place = self._advance(place, self.solver)
        return place

    def _advance(self, place: _Place, solver: Solver) -> _Place:
        """Run a move with the answers there are: to what it asks for, or to the next move."""
        assert place.start is not None
        noise = place.noise
        if noise is None and solver.stochastic:
            noise = torch.zeros_like(place.start)  # the move stops before it uses them
        done = advance(self._moves[place.move], solver, Replay(place.answers), place.start, place.history, noise)
        if isinstance(done, Ask):
            return replace(place, ask=done)
        return _Place(place.move + 1, *done)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the network's answer at `sample`, and return where the next evaluation or the next step begins.

        Args:
            model_output: the network's answer; channels beyond those of the latents, of a variance, do not count.
            timestep: one of `timesteps`.
            sample: the latents at which the network was asked.
            eta: share of the noise of DDIM (Song et al. 2021, Eq. 16), for the solver "ddim" alone.
            use_clipped_model_output: whether "ddim" keeps the noise that belongs to the image as the config's
                clipping leaves it, in place of the network's own. All other solvers do.
            generator: of the noise of stochastic solvers.
            variance_noise: that noise itself.
            return_dict: whether to return a `SolverSchedulerOutput`, or a tuple of the same.

        Raises:
            ValueError: a timestep that is not of the schedule or out of turn, an answer of another shape, an `eta` or a
                noise that the solver has no use for.
            IndexError: the schedule is at its end.
        """
        self._enter(timestep)
        solver = self._solver(eta, variance_noise)
        place = self._next(self._state(sample))
        ask, index = place.ask, self._step_index
        assert ask is not None and index is not None
        self._check_asked(ask)
        evaluation = self._evaluation(
            model_output, ask, raw=type(self.solver) is Euler and not use_clipped_model_output
        )
        noise = place.noise
        if solver.stochastic and noise is None:
            noise = variance_noise
            if noise is None:
                noise = self._drawn(ask.x, place.move, generator)
            noise = noise.to(ask.x)
        answers = (*place.answers, evaluation)
        self._place = place = self._advance(replace(place, answers=answers, ask=None, noise=noise), solver)
        self._step_index = self._expected = index + 1
        x = self._left_at(index + 1)
        if self.bottleneck is not None and index + 1 == len(self._visits):
            self.bottleneck.forget()
        denoised = evaluation.denoised.to(sample.dtype)
        latents = (x if self._scale(self._level) == 1 else x * self._scale(self._level)).to(sample.dtype)
        self._left, self._asked = _Left(latents, 0 if latents.is_inference() else latents._version, x), False
        return SolverSchedulerOutput(latents, denoised) if return_dict else (latents, denoised)

    def _drawn(self, like: Tensor, move: int, generator: Any) -> Tensor:
        """The noise of a step, the same in all dtypes: of the generator, or of paths that it chooses."""
        if not self.solver.brownian:
            return randn_tensor(like.shape, generator, like.device, like.dtype)
        if self._path is None or len(self._path.seeds) != len(like):
            chosen = randn_tensor((len(like), 2), generator, torch.device("cpu"), torch.float32)
            self._path = BrownianNoise(chosen.view(torch.int32).long().abs().sum(1), like.shape[1:])
        return self._path.draw(dtype=like.dtype, device=like.device, interval=self._moves[move].interval(like))

    def _left_at(self, index: int) -> Tensor:
        """The state after a step, before evaluation `index`, at which level latents are given back."""
        place = self._place
        if place.ask is not None:
            self._tell(index, place.ask.given)
            self._level = place.ask.given
            return place.ask.x
        assert place.start is not None
        self._level = self._visits[index].given if index < len(self._visits) else self._levels[-1]
        return place.start

    def _solver(self, eta: float, variance_noise: Tensor | None) -> Solver:
        solver = self.solver
        if eta:
            if type(solver) is not Euler or solver.afs:
                raise ValueError(f"eta={eta}: {type(solver).__name__} takes none; ddim does")
            solver = EulerAncestral(eta=eta)
        if variance_noise is not None and not solver.stochastic:
            raise ValueError(f"variance_noise: {type(solver).__name__} is deterministic here, and has no use for noise")
        return solver

    def _check_asked(self, ask: Ask) -> None:
        """Latents that the network was given without `scale_model_input` have to be what it should be given."""
        if self._asked:
            return
        if not self._source.scaled:
            if not self._warned:
                logging.getLogger("diffdistill").warning("scale_model_input should be called before the network is")
            self._warned = True
        elif self.solver.afs and self._step_index == 0:
            raise ValueError("this pipeline has no place for an analytical first step: set afs=False")
        elif not same(ask.given, self._level):
            raise ValueError("this learned solver moves the first evaluation, for which this pipeline has no place")

    def _evaluation(self, model_output: Tensor, ask: Ask, *, raw: bool) -> Evaluation:
        """The network's answer as one of the denoiser; `raw` keeps its noise where the config clips the image."""
        x, output = ask.x, model_output
        if output.shape != x.shape and output.ndim > 1:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(f"the network answers {list(model_output.shape)} for latents {list(x.shape)}")
        output = output.to(x.dtype)
        skip, out, _ = self._at(ask.given)
        denoised = torch.add(skip * x, output, alpha=out)
        clip = self._source.thresholding
        features = None if self.bottleneck is None else self.bottleneck.output
        # Under guidance stock pipelines put the conditional half last.
        features = None if features is None else features[-len(x) :]
        evaluation = Evaluation(x, ask.on_batch(), denoised if clip is None else clip(denoised), features)
        if isinstance(ask.sigma, float) and (clip is None or raw):
            # Of the network's own answer, since x - denoised loses digits at small sigma.
            slope = torch.add((1 - skip) / ask.sigma * x, output, alpha=-out / ask.sigma)
            evaluation.__dict__["eps"] = slope
        return evaluation


__all__ = ["FrozenDict", "SchedulerMixin", "SolverScheduler", "SolverSchedulerOutput"]
