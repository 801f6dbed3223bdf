"""The sampler of flow maps: models that know where a step ends (Kim et al. 2024, CTM; Sabour et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.step import AFS, Correction, Evaluation, History, Interval


class FlowMap(Euler):
    """An Euler step with the answer `D(x, sigma, s)` that a flow map gives for the end `s` of the step.

    With `gamma` the step goes on to `sqrt(1 - gamma**2) sigma_next`, and noise of the standard deviation
    `gamma sigma_next` leads back, so that the marginal at `sigma_next` is exact (Kim et al. 2024, Algorithm 3). With
    gamma = 1 that is the multistep sampler of consistency models (Song et al. 2023, Algorithm 1).

    Args:
        gamma: share of the noise that is drawn anew, from 0 (deterministic) to 1.
        afs: analytical first step.
    """

    takes_correction = False

    def __init__(self, *, gamma: float = 0.0, afs: AFS = False) -> None:
        super().__init__(afs=afs)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie between 0 and 1, but is {gamma}")
        self.gamma = gamma
        self.stochastic = gamma > 0

    def step(
        self,
        flow: ProbabilityFlow,
        x: Tensor,
        interval: Interval,
        history: History = (),
        *,
        evaluation: Evaluation | None = None,
        correction: Correction | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, History]:
        """As `Solver.step`; `noise` is needed in all steps but that to 0, where `gamma` is positive."""
        if not self.stochastic or interval.to_zero:
            return super().step(flow, x, interval, history, evaluation=evaluation, correction=correction)
        noise, end = self.check_noise(noise), interval.sigma_next
        lower = end * (1 - self.gamma**2) ** 0.5
        longer = replace(interval, sigma_next=lower, to_zero=self.gamma == 1)
        x, history = super().step(flow, x, longer, history, evaluation=evaluation, correction=correction)
        return x + per_sample(self.gamma * end, x) * noise, history

    def evaluate(
        self, flow: ProbabilityFlow, x: Tensor, interval: Interval, correction: Correction | None = None
    ) -> Evaluation:
        if self.afs and interval.index == 0:
            return super().evaluate(flow, x, interval)
        return flow(x, interval.sigma, s=interval.sigma_next)
