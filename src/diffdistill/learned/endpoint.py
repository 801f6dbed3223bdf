"""Training a learned solver on where its runs end: the whole run is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.learned.draws import draw_start
from diffdistill.learned.schedule import LearnedSchedule
from diffdistill.learned.stepwise import squared_distance
from diffdistill.models.acceleration import Compiled
from diffdistill.registry import choose
from diffdistill.solvers import AMEDPlugin, ProbabilityFlow, Solver, integrate, intervals, sample, seeded_noise
from diffdistill.solvers.amed import LearnedSteps
from diffdistill.solvers.features import feature_tap
from diffdistill.training import Loss, Objective

if TYPE_CHECKING:
    from diffdistill.solvers.gaussian.start import GaussianStart

DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"norm": torch.sqrt, "squared": lambda squared: squared}


class LearnedSampler(nn.Module):
    """What is learned of a sampler: the predictor and the noise levels."""

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
        start: the analytic start of the runs, at `sigmas[0]`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: AMEDPlugin | LearnedSteps,
        *,
        sigmas: Tensor,
        learn_schedule: bool = True,
        distance: Literal["norm", "squared"] = "norm",
        start: GaussianStart | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.solver = solver
        self.schedule = LearnedSchedule(sigmas).requires_grad_(learn_schedule)
        self.trained = LearnedSampler(solver.predictor, self.schedule)
        self.distance = choose("distance", distance, DISTANCES)
        self.start = start

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile the denoiser in the form that hands its bottleneck on."""
        self.denoiser = Compiled(self.denoiser, backend=backend)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds `noise` and `target`, `[B, ...]`, and conditions as `draw_start` takes them."""
        noise, cond = draw_start(self.denoiser, batch, generator)
        sigmas = self.schedule()
        x = noise * sigmas[0].to(noise.dtype)
        gaussian, history = None, ()
        if self.start is not None:
            levels, memory = sigmas.detach().cpu(), self.solver.memory
            x, history = self.start.begin(self.denoiser, noise, levels, cond, memory=memory)
            gaussian = self.start.denoiser(self.denoiser)
        with feature_tap(self.denoiser, self.solver) as features:
            flow = ProbabilityFlow(self.denoiser, cond, features=features, gaussian=gaussian)
            steps = intervals(sigmas, len(x), x.device, ends_at_zero=self.schedule.to_zero)
            *_, end = integrate(flow, x, self.solver, steps, history=history)
        value = self.distance(squared_distance(end, batch["target"])).mean()
        return Loss(value, {f"log_sigma_{i}": s.log() for i, s in enumerate(sigmas[1:-1].detach(), 1)})


class Endpoints:
    """Noise, labels and where a fine run carries them: a data set for `EndpointDistillation`, computed once.

    Args:
        denoiser: the model that is sampled.
        solver: of the fine run.
        sigmas: its schedule.
        seeds: one per trajectory.
        batch_size: of the fine run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        sigmas: Tensor,
        seeds: Sequence[int],
        *,
        batch_size: int = 256,
    ) -> None:
        device = device_of(denoiser)
        self.columns = {"noise": seeded_noise(seeds, denoiser.data_shape)}
        if denoiser.num_classes:
            self.columns["y"] = torch.as_tensor(seeds) % denoiser.num_classes
        ends = []
        for rows in torch.arange(len(seeds)).split(batch_size):
            part = {name: column[rows].to(device) for name, column in self.columns.items()}
            run = sample(denoiser, part["noise"], solver=solver, sigmas=sigmas, cond=part.get("y"))
            ends.append(run.cpu())
        self.columns["target"] = torch.cat(ends)

    def __len__(self) -> int:
        return len(self.columns["noise"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All columns, `[N, ...]`, to be held in memory."""
        return self.columns
