"""The stochastic N-step sampler (Meng et al. 2023, Section 3.3)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers import Correction, Euler, Evaluation, Interval, ProbabilityFlow
from diffdistill.solvers.step import History


class StochasticEuler(Euler):
    """An Euler step of twice the length, to the level after the next, then noise back to the next.

    In terms of sigma the noise that leads back from `sigma_after` has the variance `sigma_next**2 - sigma_after**2`,
    so that the marginal at `sigma_next` is exact. The last step of a schedule is the deterministic one.
    """

    stochastic = True

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
        """As `Solver.step`; `noise` is needed in all steps but the last."""
        after = interval.sigma_after
        if after is None:
            return super().step(flow, x, interval, history, evaluation=evaluation, correction=correction)
        noise, longer = self.check_noise(noise), replace(interval, sigma_next=after)
        x, history = super().step(flow, x, longer, history, evaluation=evaluation, correction=correction)
        return x + per_sample((interval.sigma_next**2 - after**2).sqrt(), x) * noise, history
