"""Training a learned solver on where its runs end: the whole run is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.learned.draws import draw_start
from diffdistill.learned.perceptual import FeatureDistance
from diffdistill.learned.schedule import LearnedSchedule
from diffdistill.learned.stepwise import squared_distance
from diffdistill.models.acceleration import Compiled
from diffdistill.registry import choose
from diffdistill.solvers import AMEDPlugin, Interval, ProbabilityFlow, Solver, intervals, sample, seeded_noise
from diffdistill.solvers.amed import LearnedSteps
from diffdistill.solvers.features import feature_tap
from diffdistill.solvers.step import History
from diffdistill.training import Loss, Objective

if TYPE_CHECKING:
    from diffdistill.solvers.gaussian.start import GaussianStart

RECOMPUTED: Any = {"use_reentrant": False, "preserve_rng_state": False}
"""How `checkpoint` takes a step again: a frozen denoiser draws nothing."""
FAR = 3.0
"""A state is out of place where its root mean square is so many times that of noisy data."""
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"norm": torch.sqrt, "squared": lambda squared: squared}


class LearnedSampler(nn.Module):
    """The learned parts of a sampler: the predictor and the noise levels."""

    def __init__(self, predictor: nn.Module, schedule: LearnedSchedule) -> None:
        super().__init__()
        self.predictor = predictor
        self.schedule = schedule


class EndpointDistillation(Objective):
    """`E || run(noise) - reference(noise) ||`, the distance of end points. Ours, beside the published stepwise form.

    Errors of different steps can cancel, and the levels themselves can be learned.

    Args:
        denoiser: the model that is sampled, guided or not; frozen.
        solver: the solver to train, around a predictor.
        sigmas: its schedule, `[N + 1]`.
        learn_schedule: learn the levels between the two ends.
        distance: "norm", or "squared", which gives the worst samples more weight.
        features: measure the distance in features too.
        recompute: keep the activations of one step, not of the run, and compute each step again in the backward pass:
            a third more time, and the memory does not grow with the number of steps.
        limit: a loss of more than so many times that of the first batch counts as one that is not finite.
        start: the analytic start of the runs, at `sigmas[0]`.
        thresholding: of the runs, as for `ProbabilityFlow`.

    Attributes:
        reached: mean square of the states after each step of the last batch, `[N]`; see `diverged_at`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: AMEDPlugin | LearnedSteps,
        *,
        sigmas: Tensor,
        learn_schedule: bool = True,
        distance: Literal["norm", "squared"] = "norm",
        features: FeatureDistance | None = None,
        recompute: bool = True,
        limit: float = 10.0,
        start: GaussianStart | None = None,
        thresholding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not limit > 1:
            raise ValueError(f"limit must be greater than 1, the loss of the first batch, but is {limit!r}")
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.solver = solver
        self.schedule = LearnedSchedule(sigmas).requires_grad_(learn_schedule)
        self.trained = LearnedSampler(solver.predictor, self.schedule)
        self.distance = choose("distance", distance, DISTANCES)
        self.features = features
        self.recompute, self.limit = recompute, limit
        self.start = start
        self.thresholding = thresholding
        self.first: Tensor | None = None
        self.reached = torch.zeros(0)

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile the denoiser in the form that hands its bottleneck on."""
        self.denoiser = Compiled(self.denoiser, backend=backend)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds `noise` and `target`, `[B, ...]`, and conditions as `draw_start` takes them."""
        noise, cond = draw_start(self.denoiser, batch, generator)
        sigmas = self.schedule()
        end = self._end(noise, cond, sigmas)
        logs = {f"log_sigma_{i}": s.log() for i, s in enumerate(sigmas[1:-1].detach(), 1)}
        value = self.distance(squared_distance(end, batch["target"])).mean()
        if self.features is not None:
            apart = self.distance(squared_distance(*self.features.pair(end, batch["target"]))).mean()
            logs |= {"states": value.detach(), "features": apart.detach()}
            value = (1 - self.features.weight) * value + self.features.weight * apart
        return Loss(self._within_limit(value), logs)

    def _end(self, noise: Tensor, cond: Any, sigmas: Tensor) -> Tensor:
        """Where the run from `noise` ends, differentiable with respect to what is learned."""
        x, gaussian, history = noise * sigmas[0].to(noise.dtype), None, ()
        if self.start is not None:
            levels, memory = sigmas.detach().cpu(), self.solver.memory
            x, history = self.start.begin(self.denoiser, noise, levels, cond, memory=memory)
            gaussian = self.start.denoiser(self.denoiser)
        reached = []
        for interval in intervals(sigmas, len(x), x.device, ends_at_zero=self.schedule.to_zero):
            step = partial(self._step, cond, gaussian, interval, history)
            x, history = checkpoint(step, x, **RECOMPUTED) if self.recompute else step(x)
            reached.append(x.detach().square().mean())
        self.reached = torch.stack(reached)
        return x

    def _step(
        self, cond: Any, gaussian: Callable[..., Tensor] | None, interval: Interval, history: History, x: Tensor
    ) -> tuple[Tensor, History]:
        """One step with a tap of its own: in the backward pass it may be taken again."""
        # Copies, so that what an evaluation derives once and keeps is not there already the second time.
        history = tuple(copy(evaluation) for evaluation in history)
        with feature_tap(self.denoiser, self.solver) as features:
            flow = ProbabilityFlow(
                self.denoiser, cond, thresholding=self.thresholding, features=features, gaussian=gaussian
            )
            return self.solver.step(flow, x, interval, history)

    def _within_limit(self, value: Tensor) -> Tensor:
        """The loss, or infinity beyond the limit; nothing here waits for the device."""
        if self.first is None:
            self.first = value.detach()
        beyond = value.detach() > self.limit * self.first.to(value.device)
        return torch.where(beyond, torch.inf, value)

    def diverged_at(self) -> int:
        """The step of the last batch after which the state was first not finite or far out of place, from 0."""
        levels = self.schedule().detach()[1 : len(self.reached) + 1].to(self.reached)
        usual = levels.square() + self.denoiser.sigma_data**2
        far = ~(self.reached < FAR**2 * usual)
        return int(far.int().argmax()) if far.any() else len(far) - 1

    def extra_state(self) -> dict[str, Any]:
        """The loss of the first batch, against which divergence is measured."""
        return {} if self.first is None else {"first": self.first}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.first = state.get("first")


class Endpoints:
    """Noise, labels and where a fine run carries them: a data set for `EndpointDistillation`, computed once.

    Args:
        denoiser: the model that is sampled.
        solver: of the fine run.
        sigmas: its schedule.
        seeds: one per trajectory.
        batch_size: of the fine run.
        thresholding: of the fine run, as for `sample`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        sigmas: Tensor,
        seeds: Sequence[int],
        *,
        batch_size: int = 256,
        thresholding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        device = device_of(denoiser)
        self.columns = {"noise": seeded_noise(seeds, denoiser.data_shape)}
        if denoiser.num_classes:
            self.columns["y"] = torch.as_tensor(seeds) % denoiser.num_classes
        ends = []
        for rows in torch.arange(len(seeds)).split(batch_size):
            part = {name: column[rows].to(device) for name, column in self.columns.items()}
            run = sample(
                denoiser,
                part["noise"],
                solver=solver,
                sigmas=sigmas,
                cond=part.get("y"),
                thresholding=thresholding,
            )
            ends.append(run.cpu())
        self.columns["target"] = torch.cat(ends)

    def __len__(self) -> int:
        return len(self.columns["noise"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All columns, `[N, ...]`, to be held in memory."""
        return self.columns
