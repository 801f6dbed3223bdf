"""Any solver of the toolbox inside the stock pipelines of diffusers that leave all scaling to the scheduler.

Those of flow matching (Stable Diffusion 3, FLUX), DiT, and unconditional ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.interop.diffusers.levels import FLOW_END
from diffdistill.interop.diffusers.solver_scheduler import FrozenDict, SchedulerMixin, SolverScheduler
from diffdistill.solvers import Solver

SHIFTING = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


class UnscaledSolverScheduler(SolverScheduler):
    """A solver in place of the scheduler of a pipeline that scales neither its noise nor what the network is given.

    Latents of such pipelines are `c_in x`, and they evaluate the network before they ask the scheduler anything. Hence
    no analytical first step. Pipelines of DiT and of unconditional models are such, and those of flow matching.

    Arguments are those of `SolverScheduler`.
    """

    @staticmethod
    def usable(solver: Solver) -> Solver:
        if solver.afs:
            raise ValueError("this pipeline has no place for an analytical first step: set afs=False")
        return SolverScheduler.usable(solver)

    @property
    def init_noise_sigma(self) -> float:
        return 1.0

    def _restart(self, step: int, evaluations: int) -> None:
        super()._restart(step, evaluations)
        self._level = self.sigmas[step : step + 1]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """`sample` itself."""
        return sample

    def _entered(self, sample: Tensor) -> Tensor:
        sample = sample.float()  # large levels lose too much in half precision
        x = sample / self._scale(self._level, sample)
        ask = self._next(x).ask
        assert ask is not None
        if not torch.allclose(self._given(ask), self._level, rtol=1e-9, atol=0):
            raise ValueError("this learned solver moves the first evaluation, for which this pipeline has no place")
        return x

    def _left(self, x: Tensor) -> Tensor:
        if self._place.step == self.num_inference_steps:
            self._level = self.sigmas[-1:]
        else:
            ask = self._next(x).ask
            assert ask is not None
            self._level = self._given(ask)
            # In place: the pipeline iterates over views of this tensor.
            self.timesteps[self._evaluations] = float(self._time(self._level))
        return x * self._scale(self._level, x)

    def _scale(self, level: Tensor, like: Tensor) -> Tensor:
        """What the network's input is over x, at a level `[1]` that the batch shares."""
        return per_sample(self.preconditioning.c_in(level).to(like.device).expand(len(like)), like)


class FlowSolverScheduler(UnscaledSolverScheduler):
    """A solver with its noise levels, in place of the scheduler of a flow-matching pipeline.

    Latents of such pipelines are `x / (1 + sigma)`.

    These pipelines pass no generator to a scheduler: the noise of a stochastic solver is that of `torch.manual_seed`.

    Arguments are those of `SolverScheduler`. Without `schedule` and `sigmas` the levels are those that the pipeline's
    own scheduler chooses, but for the first, noise alone, which becomes that of the time 0.999. From there Euler,
    DPM-Solver++ and UniPC keep their digits in float32, since they build on the denoised image; others keep fewer.
    """

    @property
    def config(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With the settings of the pipeline's own scheduler by which pipelines compute `mu`."""
        source = self.__dict__.get("source")
        kept = {} if source is None else {name: source.config[name] for name in SHIFTING if name in source.config}
        return FrozenDict({**self._internal_dict, **kept})

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels: those of the config, or else those of the pipeline's own scheduler.

        Args:
            num_inference_steps: the number of steps, where `sigmas` does not say it.
            device: of the timesteps.
            sigmas: the pipeline's times from 1 to 0, without the last; levels of the config go before them.
            mu: by how much the pipeline's own scheduler shifts the times, where it does.

        Raises:
            ValueError: another number of steps than the config's noise levels have.
        """
        given = None if sigmas is None else [float(t) for t in sigmas]
        if self.config.sigmas is not None or self.config.schedule is not None:
            super().set_timesteps(num_inference_steps if given is None else len(given), device)
            return
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps} if given is None else {"sigmas": given}
        if self.source.config.get("use_dynamic_shifting"):
            options["mu"] = self.source.config.base_shift if mu is None else mu
        self.source.set_timesteps(**options)
        t = self.source.sigmas.double().clamp(max=FLOW_END)
        super().set_timesteps(None, device, sigmas=t / (1 - t))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Latents `(1 - t) x0 + t noise` at timesteps `[B]` or `[1]`, where image-to-image pipelines begin."""
        t = torch.as_tensor(timestep).reshape(-1) / self.levels.preconditioning["time_scale"]
        t = per_sample(t.to(sample.device).expand(len(sample)), sample)
        return (1 - t) * sample + t * noise


# A saved pipeline is only loaded where the module of its scheduler holds the mixin too.
__all__ = ["FlowSolverScheduler", "SchedulerMixin", "UnscaledSolverScheduler"]
