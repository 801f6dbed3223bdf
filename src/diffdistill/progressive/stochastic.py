"""The stochastic N-step sampler (Meng et al. 2023, Section 3.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers import Euler, Interval, ProbabilityFlow


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
        history: Any = (),
        *,
        noise: Tensor | None = None,
        **evaluated: Any,
    ) -> tuple[Tensor, Any]:
        """As `Solver.step`; `noise` is needed in all steps but the last."""
        after = interval.sigma_after
        if after is None:
            return super().step(flow, x, interval, history, **evaluated)
        if noise is None:
            raise ValueError("the stochastic sampler needs noise: pass noise= in the shape of x")
        x_after, history = super().step(flow, x, replace(interval, sigma_next=after), history, **evaluated)
        back = (interval.sigma_next**2 - after**2).sqrt()
        return x_after + per_sample(back, x) * noise, history
