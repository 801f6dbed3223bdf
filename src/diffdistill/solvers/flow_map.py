"""The sampler of flow maps: models that know where a step ends (Kim et al. 2024, CTM; Sabour et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.euler import Euler
from diffdistill.solvers.step import AFS, Evaluation, Step


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

    def update(self, step: Step) -> Tensor:
        if not self.stochastic:
            return super().update(step)
        lower = replace(step.interval, sigma_next=self._lower(step))
        x = super().update(replace(step, interval=lower))
        return x + per_sample(self.gamma * step.interval.sigma_next, x) * step.fresh

    def evaluate(self, step: Step) -> Evaluation:
        if self.afs and step.interval.index == 0:
            return super().evaluate(step)
        return step.flow(step.x, step.interval.sigma, s=self._lower(step))

    def _lower(self, step: Step) -> Tensor:
        """Where the deterministic part of the step ends, `[B]`."""
        return step.interval.sigma_next * (1 - self.gamma**2) ** 0.5 if self.stochastic else step.interval.sigma_next
