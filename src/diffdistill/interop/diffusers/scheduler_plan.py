"""The evaluations of a run, laid out before it: at which noise levels a solver will ask the network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffdistill.solvers import Euler, Evaluation, Interval, ProbabilityFlow, Solver
from diffdistill.solvers.levels import Level, on_batch, plain, shared
from diffdistill.solvers.step import History


@dataclass(frozen=True, eq=False)
class Ask:
    """The evaluation that a move needs next: at `x`, whose level is `sigma`, told the network as `given`."""

    x: Tensor
    sigma: Level
    given: float

    def on_batch(self) -> Tensor:
        return on_batch(self.sigma, self.x)


class _Needed(Exception):
    """Carries an `Ask` out of a solver's step."""


class Replay(ProbabilityFlow):
    """A flow that knows some answers, in order, and asks for the next."""

    def __init__(self, answers: Sequence[Evaluation]) -> None:
        super().__init__(lambda x, sigma, cond: x)
        self.answers = iter(answers)

    def __call__(
        self, x: Tensor, sigma: Level, *, scale_time: Tensor | None = None, s: Tensor | None = None
    ) -> Evaluation:
        if s is not None:
            raise TypeError("a flow map is told where its step ends, for which stock pipelines have no place")
        known = next(self.answers, None)
        if known is not None:
            return known
        level = plain(sigma) if isinstance(sigma, Tensor) else sigma
        given = level if scale_time is None else level * scale_time
        raise _Needed(Ask(x, level, _one(given)))


def _one(given: Level) -> float:
    """The level of the whole batch.

    Raises:
        ValueError: a learned solver that gives the images of a batch different noise levels.
    """
    if not isinstance(given, Tensor):
        return float(given)
    values = given.detach().cpu()
    if not torch.allclose(values, values[:1], rtol=1e-6, atol=0):
        raise ValueError(
            "this learned solver gives every image a noise level of its own, but a stock pipeline has one for the "
            "batch: draw one image at a time"
        )
    return float(values[0])


@dataclass(frozen=True)
class Move:
    """From one noise level to the next: a step `index` of `total` of the schedule, or a part of one.

    Its kind says by what: the solver, Euler's method, or "still": the network is asked and nothing is changed.
    """

    sigma: float
    sigma_next: float
    index: int
    total: int
    sigma_after: float | None = None
    kind: Literal["solver", "euler", "still"] = "solver"

    def interval(self, like: Tensor) -> Interval:
        """For the samples `like`."""
        levels = (self.sigma, self.sigma_next, self.sigma_after)
        sigma, below, after = (None if level is None else shared(level, len(like), like.device) for level in levels)
        assert sigma is not None and below is not None
        return Interval(sigma, below, self.index, self.total, self.sigma_next == 0, after)


def halted(move: Move) -> Move:
    """A move that stays at the level at which `move` begins."""
    return replace(move, sigma_next=move.sigma, sigma_after=None, kind="still")


def moves_of(levels: Sequence[float], solver: Solver, noise_alone: float) -> list[Move]:
    """The moves of a schedule.

    Where sigma is infinite, noise alone, Euler's method has a limit and keeps its digits. There it takes the first step
    of all deterministic solvers: for multistep ones that is their own, and those of several stages take as many small
    steps as they have stages, at equal distances in the time of rectified flow.
    """
    total = len(levels) - 1
    moves = []
    for i, (sigma, below) in enumerate(itertools.pairwise(levels)):
        after = levels[i + 2] if i + 2 <= total else None
        move = Move(sigma, below, i, total, after)
        if sigma == below:
            moves.append(halted(move))
        elif max(sigma, below) >= noise_alone and below > 0 and not (solver.stochastic or hasattr(solver, "predictor")):
            start, end = sigma / (1 + sigma), below / (1 + below)
            times = [start + (end - start) * stage / solver.stages for stage in range(solver.stages + 1)]
            places = [sigma, *(time / (1 - time) for time in times[1:-1]), below]
            moves += [Move(a, b, i, total, None, "euler") for a, b in itertools.pairwise(places)]
        else:
            moves.append(move)
    return moves


def advance(
    move: Move, solver: Solver, flow: Replay, x: Tensor, history: History, noise: Tensor | None
) -> Ask | tuple[Tensor, History]:
    """Make a move with the answers that `flow` knows: its end, or what it asks for."""
    try:
        if move.kind == "still":
            flow(x, move.sigma)
            return x, history
        if move.kind == "euler":
            evaluation = flow(x, move.sigma)
            x, _ = Euler().step(flow, x, move.interval(x), evaluation=evaluation)
            return x, (evaluation,) if solver.memory else ()
        return solver.step(flow, x, move.interval(x), history, noise=noise)
    except _Needed as needed:
        return needed.args[0]


@dataclass(frozen=True)
class Visit:
    """An evaluation of a run.

    Attributes:
        move: the number of the move that asks for it.
        sigma, given: the level of the state, and the one that the network is told.
        time: what that is for the network.
        exact: False for a level that only the run can tell, which stands at the geometric mean until then.
    """

    move: int
    sigma: float
    given: float
    time: float
    exact: bool = True


def visits_of(
    moves: Sequence[Move], solver: Solver, times: Mapping[float, float], time: Callable[[float], float]
) -> list[Visit]:
    """The evaluations of all moves, by a run in which the network answers zero.

    Args:
        moves: of the run.
        solver: that makes them.
        times: the timesteps of the levels at which steps begin.
        time: the timestep of any other.
    """
    visits = []
    for number, move in enumerate(moves):
        for sigma, given, exact in _asked(move, solver):
            at = times[given] if given in times else time(given)
            visits.append(Visit(number, sigma, given, at, exact))
    return visits


def _asked(move: Move, solver: Solver) -> list[tuple[float, float, bool]]:
    """`sigma`, `given` and whether they are exact, of the evaluations of a move."""
    zero = torch.zeros(1, 1)
    answers: list[Evaluation] = []
    asked: list[tuple[float, float, bool]] = []
    try:
        while True:
            done = advance(move, solver, Replay(answers), zero, (), zero if solver.stochastic else None)
            if not isinstance(done, Ask):
                return asked
            learned = solver.features != "unused" and len(asked) > 0
            asked.append((_one(done.sigma), done.given, not learned))
            if learned:
                asked[-1] = _middle(move)
            answers.append(Evaluation(done.x, done.on_batch(), zero))
    except ValueError:  # a predictor that needs the features of the network, or the samples of a batch
        count = 1 if move.sigma_next == 0 else solver.stages - (1 if solver.afs and move.index == 0 else 0)
        begins = [(move.sigma, move.sigma, False)] if not (solver.afs and move.index == 0) else []
        return [*begins, *[_middle(move)] * (count - len(begins))]


def _middle(move: Move) -> tuple[float, float, bool]:
    mean = (move.sigma * move.sigma_next) ** 0.5
    return mean, mean, False
