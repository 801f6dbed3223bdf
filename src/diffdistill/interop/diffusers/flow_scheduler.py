"""Any solver of the toolbox inside the stock pipelines of flow matching: Stable Diffusion 3, FLUX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.interop.diffusers.solver_scheduler import SchedulerMixin, SolverScheduler
from diffdistill.solvers import Solver


class FlowSolverScheduler(SolverScheduler):
    """A solver with its noise levels, in place of the scheduler of a flow-matching pipeline.

    Latents of such pipelines are `x / (1 + sigma)`, and `sigmas` hold the time `sigma / (1 + sigma)`. They evaluate the
    network before they ask the scheduler anything: hence no analytical first step. They pass no generator to a
    scheduler either: the noise of a stochastic solver is that of `torch.manual_seed`.

    Arguments are those of `SolverScheduler`. Levels of the config go before the `sigmas` that these pipelines choose.
    """

    @staticmethod
    def usable(solver: Solver) -> Solver:
        if solver.afs:
            raise ValueError("this pipeline has no place for an analytical first step: set afs=False")
        return SolverScheduler.usable(solver)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        **options: Any,
    ) -> None:
        """As `SolverScheduler.set_timesteps`.

        Args:
            num_inference_steps: the number of steps.
            device: of the timesteps.
            timesteps: those of the steps, in place of a number.
            sigmas: the times of the steps from 1 to 0, without the last, in place of a number.
            mu: by how much the stock scheduler shifts the times, where it does.
            options: others that the stock scheduler takes.
        """
        if self.config.sigmas is not None or self.config.schedule is not None:
            given = sigmas if timesteps is None else timesteps
            count = num_inference_steps if given is None else len(given)
            super().set_timesteps(count, device, **options)
            self._custom = given is not None
            return
        if self.config.get("use_dynamic_shifting"):
            options["mu"] = self.config.base_shift if mu is None else mu
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps, sigmas=sigmas, **options)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Latents `(1 - t) x0 + t noise` at timesteps `[B]` or `[1]`, where image-to-image pipelines begin."""
        return self.add_noise(sample, noise, timestep)


# A saved pipeline is only loaded where the module of its scheduler holds the mixin too.
__all__ = ["FlowSolverScheduler", "SchedulerMixin"]
