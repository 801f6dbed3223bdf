"""The noise levels of a scheduler of diffusers, as a preconditioning of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.registry import choose
from diffdistill.solvers.schedules import flow_levels

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
FLOW_END = 0.999
"""The largest time of flow models: at 1, noise alone, sigma is infinite."""


@dataclass(frozen=True)
class Levels:
    """Prediction type and noise levels of a network, read from its scheduler.

    Attributes:
        preconditioning: options of `make_preconditioning`.
        sigma_min, sigma_max: the noise levels that the network was trained on.
    """

    preconditioning: dict[str, Any]
    sigma_min: float
    sigma_max: float


def stock(scheduler: Any) -> Any:
    """The scheduler of diffusers that one of ours stands in for; any other as it is."""
    return getattr(scheduler, "source", scheduler)


def levels_of(scheduler: Any, *, time_scale: float = 1000.0) -> Levels:
    """Read prediction type and noise levels of a scheduler.

    Args:
        scheduler: any scheduler of discrete time (with `alphas_cumprod`), or one of flow matching.
        time_scale: what flow models multiply the time t in [0, 1] by before they embed it.

    Raises:
        ValueError: an unknown prediction type, a scheduler without noise levels, or one of continuous time.
    """
    scheduler = stock(scheduler)
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        end = FLOW_END / (1 - FLOW_END)
        return Levels({"name": "flow", "time_scale": time_scale}, 1 / end, end)
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"{name} with timestep_type='continuous' is not read: its network is given log(sigma) / 4")
    try:
        kind = choose("prediction type", prediction, PREDICTIONS)
    except ValueError as error:
        raise ValueError(f"{name}: {error}, flow_prediction") from None
    table = sigma_table(scheduler)
    return Levels({"name": kind, "table": table.tolist()}, float(table[0]), float(table[-1]))


def is_flow(scheduler: Any) -> bool:
    """Whether a stock scheduler is one of flow matching.

    Raises:
        ValueError: times of flow matching for a network of another kind, or the other way round.
    """
    config, name = scheduler.config, type(scheduler).__name__
    predicts, steps = config.get("prediction_type") == "flow_prediction", bool(config.get("use_flow_sigmas"))
    if "use_flow_sigmas" in config and predicts != steps:
        raise ValueError(
            f"{name} has use_flow_sigmas={steps} and prediction_type={config.prediction_type!r}: "
            'flow matching needs use_flow_sigmas=True and prediction_type="flow_prediction" together'
        )
    return name.startswith("FlowMatch") or predicts


def sigma_table(scheduler: Any, *, noise_alone: float = 2.0**12) -> Tensor:
    """The noise levels of a scheduler of discrete time, increasing, float64 `[T]`.

    They follow from `alphas_cumprod`, which the stock schedulers compute in float32 and all use.

    Args:
        scheduler: one of diffusers, or of ours.
        noise_alone: the last level where betas are rescaled to zero terminal SNR and it is infinite; by default what
            the stock solvers put in its place.

    Raises:
        ValueError: the scheduler has none.
    """
    own = stock(scheduler)
    alphas = getattr(own, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod: it is neither of discrete time nor of flow matching"
        )
    alpha_bar = alphas.detach().cpu().double()
    if not (alpha_bar[1:] < alpha_bar[:-1]).all() or alpha_bar[0] >= 1:  # float32 does not tell all levels apart
        alpha_bar = torch.cumprod(1 - own.betas.detach().cpu().double(), 0)
    levels = ((1 - alpha_bar) / alpha_bar).sqrt()
    return torch.where(alpha_bar == 0, noise_alone, levels)


def flow_shift(sigmas: Sequence[float]) -> float | None:
    """The `shift` at which a stock flow-matching scheduler has these noise levels, or None if it has them at none.

    Args:
        sigmas: decreasing, down to 0.
    """
    num_steps = len(sigmas) - 1
    shift = float(sigmas[1]) / (num_steps - 1) if num_steps > 1 else 1.0
    stock = flow_levels(num_steps=num_steps, shift=shift)
    return shift if torch.allclose(torch.tensor(sigmas, dtype=torch.float64), stock, rtol=1e-5, atol=0) else None
