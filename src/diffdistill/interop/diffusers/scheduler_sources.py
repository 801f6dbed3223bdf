"""What the stock schedulers of diffusers say: in which units a pipeline holds its latents, and at which noise levels.

Everything here speaks of the package's sigma, `x = x0 + sigma n`. The stock schedulers hold their latents in one of two
units: those of the network's input, `c_in(sigma) x`, or x itself, which `scale_model_input` turns into the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.levels import FLOW_END, PREDICTIONS, is_flow, sigma_table
from diffdistill.models.preconditioning import EDM, Preconditioning, RectifiedFlow, VPrediction, make_preconditioning
from diffdistill.registry import choose
from diffdistill.solvers import dynamic_thresholding
from diffdistill.solvers.discrete_time import interpolate
from diffdistill.solvers.schedules import NOISE_ALONE

SCALED, UNSCALED = "scaled", "unscaled"
CONVENTIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
            *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
            *("DEISMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler"),
            *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
            *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
        ),
        SCALED,
    ),
    **dict.fromkeys(
        (
            *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
            *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
            *("DPMSolverSDEScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
        ),
        UNSCALED,
    ),
}
"""The units of the latents of the stock schedulers, by their own `scale_model_input` and `init_noise_sigma`."""
SIBLINGS = {
    "PNDMScheduler": "DDIMScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
}
"""Schedulers whose timesteps list stages of their own method too, and those that have the same levels without."""


class Continuous(VPrediction):
    """The network of v of a continuous time, `c_noise = log(sigma) / 4`: Stable Video Diffusion."""

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4


class EDMVelocity(EDM):
    """EDM's network with the other sign, which diffusers calls v."""

    def c_out(self, sigma: Tensor) -> Tensor:
        return -super().c_out(sigma)


class InvertedFlow(RectifiedFlow):
    """A flow network of the time `1 - t`, whose velocity has the other sign: Mochi."""

    def c_out(self, sigma: Tensor) -> Tensor:
        return -super().c_out(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.time_scale / (1 + sigma)


@dataclass(frozen=True, eq=False)
class Source:
    """A stock scheduler, as one of ours reads it.

    Attributes:
        scheduler: the stock scheduler.
        scaled: whether latents are `c_in x`, which the network is given as they are.
        preconditioning: what the network predicts.
        table: the `[T]` noise levels of a model of discrete time, or None.
        noise_alone: levels from this on stand for noise without an image, infinite if there are none.
        thresholding: what the config asks of every prediction of x0, or None.
    """

    scheduler: Any
    scaled: bool
    preconditioning: Preconditioning
    table: Tensor | None
    noise_alone: float
    thresholding: Callable[[Tensor], Tensor] | None

    @property
    def flow(self) -> bool:
        return isinstance(self.preconditioning, RectifiedFlow)

    @property
    def ends(self) -> dict[str, Any]:
        """The options `sigma_min` and `sigma_max`, and `table` where there is one, of `make_schedule`."""
        config = self.scheduler.config
        if self.flow:
            return {
                "sigma_min": (1 - FLOW_END) / FLOW_END,
                "sigma_max": FLOW_END / (1 - FLOW_END),
            }  # at the time 1 it is infinite
        if self.table is not None:
            return {"sigma_min": float(self.table[0]), "sigma_max": float(self.table[-1]), "table": self.table}
        if config.sigma_min is None or config.sigma_max is None:
            levels = sigma_table(self.scheduler)
            return {"sigma_min": float(levels[0]), "sigma_max": float(levels[-1])}
        return {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}

    def time(self, sigma: float) -> float:
        """What the network is told of a noise level."""
        return float(self.preconditioning.c_noise(torch.tensor([sigma], dtype=torch.float64)))

    def sigma(self, time: float) -> float:
        """The noise level of a timestep.

        Raises:
            ValueError: there is none.
        """
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if self.flow:
            share = time / config.num_train_timesteps
            share = 1 - share if isinstance(self.preconditioning, InvertedFlow) else share
            if not 0 <= share <= 1:
                raise ValueError(f"timestep {time} is none of {name}: they lie in [0, {config.num_train_timesteps}]")
            return from_flow(share)
        if self.table is None:
            return float(torch.tensor(4.0 * time, dtype=torch.float64).exp())
        if not 0 <= time <= len(self.table) - 1:
            raise ValueError(f"timestep {time} is none of {name}: they lie in [0, {len(self.table) - 1}]")
        places = torch.arange(len(self.table), dtype=torch.float64)
        return float(interpolate(torch.tensor([time], dtype=torch.float64), places, self.table.log()).exp())

    def start(self, sigma: float) -> float:
        """What pipelines multiply noise by, to begin at `sigma`."""
        if self.scaled:
            return 1.0
        exact = self.table is not None and self.scheduler.config.get("timestep_spacing") in ("linspace", "trailing")
        return sigma if exact else (sigma**2 + 1) ** 0.5

    def levels(self, **options: Any) -> tuple[list[float], list[float]]:
        """Noise levels `[N + 1]`, and timesteps `[N]`, integers or not, that the stock scheduler chooses.

        Args:
            options: of its `set_timesteps`, without `device`; `timesteps` and `sigmas` are understood for all.

        Raises:
            TypeError: an option that it does not have.
        """
        name = type(self.scheduler).__name__
        scheduler = self.scheduler
        if name in SIBLINGS:
            same = {setting: value for setting, value in scheduler.config.items() if not setting.startswith("_")}
            scheduler = getattr(diffusers(), SIBLINGS[name]).from_config(same)
        taken = inspect.signature(scheduler.set_timesteps).parameters
        given = {option: value for option, value in options.items() if value is not None}
        custom = next((option for option in ("timesteps", "sigmas") if option in given), None)
        if custom is not None and (custom not in taken or (custom == "sigmas" and not self._takes_sigmas(scheduler))):
            return self._custom(custom, [float(value) for value in given[custom]])
        for option in given:
            if option not in taken:
                known = ", ".join(known for known in taken if known != "device")
                raise TypeError(f"{name} takes no {option} in set_timesteps: it takes {known}")
        scheduler.set_timesteps(**given)
        return self._read(scheduler)

    def _final(self) -> float:
        """The last level, 0 unless the config says that it is the lowest of the model."""
        lowest = self.scheduler.config.get("final_sigmas_type") == "sigma_min"
        lowest = lowest or not self.scheduler.config.get("set_alpha_to_one", True)
        return float(self.table[0]) if lowest and self.table is not None else 0.0

    def _takes_sigmas(self, scheduler: Any) -> bool:
        return self.flow or not type(scheduler).__name__.startswith("UniPC")  # which takes those of flow alone

    def _custom(self, kind: str, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """Levels given as timesteps, or as sigmas in the stock schedulers' sense: of flow, t without the last 0."""
        if kind == "timesteps":
            return [*(self.sigma(time) for time in values), self._final()], list(values)
        levels = [*(from_flow(t) for t in values), 0.0] if self.flow else list(values)
        return levels, [self.time(level) for level in levels[:-1]]

    def _read(self, scheduler: Any) -> tuple[list[float], list[float]]:
        times = scheduler.timesteps.tolist()
        stored = getattr(scheduler, "sigmas", None)
        if stored is None:
            assert self.table is not None
            return [*self.table[times].tolist(), self._final()], times
        values = torch.as_tensor(stored).double().tolist()
        if scheduler.order == 2:  # which list most levels twice, and step from the last of two
            last = [i for i in range(len(times)) if values[i + 1] != values[i]]
            values, times = [*(values[i] for i in last), values[-1]], [times[i] for i in last]
        if isinstance(self.preconditioning, InvertedFlow):
            values = [1 - value for value in values]
        if not self.flow:
            return values, times
        if values[-1] == values[-2] and self.scheduler.config.get("final_sigmas_type") != "sigma_min":
            values[-1] = 0.0  # DEIS and SASolver stop before it, with noise in the image
        return [from_flow(value) for value in values], times


def from_flow(time: float) -> float:
    """The sigma of a time of rectified flow: `t / (1 - t)`, with a large number for noise alone."""
    return NOISE_ALONE if time >= 1 - 2**-26 else time / (1 - time)


def to_flow(sigma: float) -> float:
    """The time of rectified flow of a sigma."""
    return sigma / (1 + sigma)


def read_source(scheduler: Any) -> Source:
    """Read a stock scheduler.

    Raises:
        ValueError: a scheduler, a type of prediction or a setting that is not known, by name.
    """
    config, name = scheduler.config, type(scheduler).__name__
    scaled = choose("scheduler of diffusers", name, CONVENTIONS) == SCALED
    if config.get("stochastic_sampling"):
        raise ValueError(f'{name} asks for stochastic_sampling: set it to False, and give solver="stochastic"')
    table, noise_alone = None, float("inf")
    if is_flow(scheduler):
        noise_alone = NOISE_ALONE
        kind = InvertedFlow if config.get("invert_sigmas") else RectifiedFlow
        network: Preconditioning = kind(time_scale=config.num_train_timesteps)
    elif name.startswith("EDM"):
        kinds = {"epsilon": EDM, "v_prediction": EDMVelocity}
        network = choose("prediction type", config.prediction_type, kinds)(sigma_data=config.sigma_data)
    else:
        table = sigma_table(scheduler, noise_alone=NOISE_ALONE)
        kind = choose("prediction type", _prediction(config), PREDICTIONS)
        network = make_preconditioning(kind, table=table)
        if config.get("rescale_betas_zero_snr"):
            noise_alone = float(table[-1]) * (1 - 1e-6)
        if config.get("timestep_type") == "continuous" and kind == "v":
            network, table = Continuous(), None
    return Source(scheduler, scaled, network, table, noise_alone, _thresholding(name, config))


def _prediction(config: Any) -> str:
    prediction = config.get("prediction_type", "epsilon")
    return "sample" if prediction == "original_sample" else prediction


def _thresholding(name: str, config: Any) -> Callable[[Tensor], Tensor] | None:
    """What the config asks of a prediction of x0; `thresholding` goes before `clip_sample`, as in DDIM."""
    if name.startswith(("CogVideoX", "TCD")):  # which have these settings and do not look at them
        return None
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return partial(dynamic_thresholding, quantile=ratio, most=most)
    if config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
        return partial(torch.clamp, min=-bound, max=bound)
    return None


def class_of(config: Mapping[str, Any]) -> str:
    """The class of the stock scheduler with this config, which names it or has exactly its settings.

    Raises:
        ValueError: there is none.
    """
    named = config.get("_class_name")
    if named is not None:
        choose("scheduler of diffusers", named, CONVENTIONS)
        return named
    given = {name for name in config if not name.startswith("_")}
    for name in CONVENTIONS:
        kind = getattr(diffusers(), name, None)
        if kind is not None and given == set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}:
            return name
    raise ValueError(f"these settings are of no known scheduler: give source=, one of {', '.join(sorted(CONVENTIONS))}")
