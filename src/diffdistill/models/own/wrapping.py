"""`wrap`: any network becomes a denoiser that is sampled, distilled, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.models.building import build_denoiser
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.own.adapter import OwnNetwork
from diffdistill.models.own.registration import REGISTERED, UNREGISTERED, Call, Time, is_plain, made_as
from diffdistill.models.storage import MODEL, load_state
from diffdistill.registry import choose
from diffdistill.solvers.discrete_time import TABLES, table_from_alphas, table_from_betas, table_from_sigmas

Prediction = Literal["eps", "v", "x0", "flow", "edm", "denoised"]
DISCRETE = ("eps", "v", "x0")


def wrap(
    net: nn.Module,
    prediction: Prediction | None = None,
    *,
    betas: Sequence[float] | Tensor | None = None,
    alphas_cumprod: Sequence[float] | Tensor | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    schedule: str | None = None,
    data_shape: Sequence[int] | None = None,
    num_classes: int = 0,
    null_label: int | None = None,
    call: Call | None = None,
    time: Time | None = None,
    w_into: str | None = None,
    bottleneck: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_data: float | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> NetworkDenoiser:
    """Make a denoiser of any network; it is tried once, so that what does not fit is said at once.

    Args:
        net: the network; it is not copied, and goes into eval mode.
        prediction: what it answers: "eps" (the noise), "v" (Salimans and Ho 2022) or "x0", of models of discrete time,
            which are given `x / sqrt(1 + sigma^2)`; "flow" (`n - x0` at `(1 - t) x0 + t n`, Liu et al. 2023); "edm" (F
            of Karras et al. 2022, given `c_in x` and `log(sigma) / 4`); "denoised" (x0, given x and sigma themselves).
        betas: the noise levels of a model of discrete time, from the least noise to the most, in this or one of the
            next three forms.
        alphas_cumprod: the part of the variance that is signal, which decreases.
        sigmas: `sqrt((1 - alphas_cumprod) / alphas_cumprod)`.
        schedule: "linear" (DDPM), "scaled_linear" (latent diffusion) or "iddpm" (the cosine of improved DDPM).
        data_shape: shape of one sample, such as `(2,)`, `(3, 32, 32)` or `(3, 16, 32, 32)`.
        num_classes: number of class labels, 0 for none.
        null_label: the label that stands for "no class" inside the network; without one, it cannot be guided.
        call: `call(net, x, t, cond) -> output`, where another call than `net(x, t)`, or `net(x, t, labels)`, is needed:
            for one-hot labels, keywords, tuples as answers, a time that runs the other way. `t` is `[B]`, `cond` long
            `[B]` or None.
        time: what `t` is: "index" (from 0 to T - 1, or to 1000 in a flow; a float, since noise levels lie between those
            of the table too), "integer" (the index rounded, for tables of embeddings) or "unit" (index / T, or t of a
            flow); by default "index", or "unit" of a flow. Without meaning for "edm" and "denoised".
        w_into: name of the module, such as the one that embeds the time, to whose output stage 1 adds the embedding of
            the guidance weight.
        bottleneck: name of the module whose output learned solvers read.
        sigma_min: the least noise level that it was trained on; by default that of the table, of t = 0.001 of a flow,
            and 0.002 otherwise.
        sigma_max: the greatest; by default that of the table, of t = 0.999 of a flow, and 80 otherwise.
        sigma_data: standard deviation of the data, for "edm" and "denoised"; 0.5 by default.
        weights: a file that `save_denoiser` wrote of such a denoiser. It says all but `call`.

    Returns:
        The denoiser, on the device of `net`. Its file names the network where it has a name (`register_network`);
        where it has none, or is called by a `call` of its own, which no file can hold, this function loads it again,
        given `weights`.

    Raises:
        ValueError: options that do not fit each other or the network, in one line.
    """
    if next(net.parameters(), None) is None:
        raise ValueError(f"{type(net).__name__} has no parameters: what computes without any is a denoiser as it is")
    made = made_as(net)
    registration = None if made is None else REGISTERED.get(made[0])
    defaults = dict(registration.defaults) if registration else {}
    if weights is not None:
        given = {"prediction": prediction, "betas": betas, "alphas_cumprod": alphas_cumprod, "sigmas": sigmas}
        given |= {"schedule": schedule, "data_shape": data_shape, "num_classes": num_classes or None}
        given |= {"null_label": null_label, "time": time, "w_into": w_into, "bottleneck": bottleneck}
        given |= {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data}
        said = [name for name, value in given.items() if value is not None]
        if said:
            raise ValueError(f"weights={os.fspath(weights)} says what {said[0]} is: leave {', '.join(said)} out")
        return _from_file(net, weights, call or (registration.call if registration else None))
    if prediction is None or data_shape is None:
        missing = "prediction" if prediction is None else "data_shape"
        raise ValueError(f"wrap needs {missing}, or a file of weights that says it")
    choose("prediction", prediction, dict.fromkeys((*DISCRETE, "flow", "edm", "denoised")))
    spoken: Time = time or defaults.get("time") or ("unit" if prediction == "flow" else "index")
    choose("form of the time", spoken, dict.fromkeys(("index", "integer", "unit")))
    table = _table(prediction, {"betas": betas, "alphas_cumprod": alphas_cumprod, "sigmas": sigmas}, schedule)
    preconditioning, scale = _levels(prediction, table, spoken, sigma_data)
    adapter = {
        "null_label": defaults.get("null_label") if null_label is None else null_label,
        "time_scale": scale,
        "integer_time": spoken == "integer",
        "w_into": w_into or defaults.get("w_into"),
        "bottleneck": bottleneck or defaults.get("bottleneck"),
    }
    call = call or (registration.call if registration else None)
    network = OwnNetwork(net, num_classes=num_classes, call=call, **adapter)
    config = {
        "network": _named(net, call),
        "adapter": adapter,
        "preconditioning": preconditioning,
        "data_shape": _shape(data_shape),
        "num_classes": num_classes,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }
    denoiser = _placed(build_denoiser(config, network=network), net)
    middle = torch.tensor([(denoiser.sigma_min * denoiser.sigma_max) ** 0.5], dtype=torch.float64, device=_device(net))
    network.try_call(denoiser.data_shape, float(denoiser.preconditioning.c_noise(middle)))
    return denoiser


def _shape(data_shape: Sequence[int]) -> list[int]:
    shape: list[int] = list(data_shape) if isinstance(data_shape, Sequence) else []
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"data_shape is the shape of one sample, such as (3, 32, 32), not {data_shape!r}")
    return shape


def _table(prediction: str, given: Mapping[str, Any], schedule: str | None) -> Tensor | None:
    """The noise levels of a model of discrete time, increasing; None for others."""
    said = [name for name, value in {**given, "schedule": schedule}.items() if value is not None]
    if prediction not in DISCRETE:
        if said:
            raise ValueError(f"prediction={prediction!r} is of continuous time: leave out {', '.join(said)}")
        return None
    if len(said) != 1:
        forms = "betas, alphas_cumprod, sigmas or schedule"
        raise ValueError(
            f"prediction={prediction!r} needs its noise levels in one form, {forms}: {said or 'none'} given"
        )
    if schedule is not None:
        return choose("schedule of a model of discrete time", schedule, TABLES)()
    read = {"betas": table_from_betas, "alphas_cumprod": table_from_alphas, "sigmas": table_from_sigmas}[said[0]]
    return read(given[said[0]])


def _levels(
    prediction: str, table: Tensor | None, time: Time, sigma_data: float | None
) -> tuple[dict[str, Any], float]:
    """The preconditioning, and what the time is multiplied by."""
    if sigma_data is not None and prediction not in ("edm", "denoised"):
        raise ValueError(f"sigma_data={sigma_data}: prediction={prediction!r} does not depend on it, leave it out")
    if table is not None:
        options = {"noise_level": "nearest"} if time == "integer" else {}
        return {"name": prediction, "table": table.tolist(), **options}, 1 / len(table) if time == "unit" else 1.0
    if prediction == "flow":
        return {"name": "flow", "time_scale": 1.0 if time == "unit" else 1000.0}, 1.0
    return {"name": prediction, "sigma_data": Denoiser.sigma_data if sigma_data is None else sigma_data}, 1.0


def _named(net: nn.Module, call: Call | None) -> dict[str, Any]:
    """The entry `network` of the config: a name and options that build it again, or why there are none."""
    made, kind = made_as(net), type(net).__name__
    if made is None or made[0] not in REGISTERED:
        return {"name": UNREGISTERED, "kind": kind, "reason": "has no registered name"}
    name, options = made
    if call is not REGISTERED[name].call:
        return {"name": UNREGISTERED, "kind": kind, "reason": "is called by a function that no file can hold"}
    if not is_plain(options):
        return {"name": UNREGISTERED, "kind": kind, "reason": "was built with options that no file can hold"}
    return {"name": name, **options}


def _from_file(net: nn.Module, path: str | os.PathLike[str], call: Call | None) -> NetworkDenoiser:
    path = Path(path)
    config, state = MODEL.read(path / "model.safetensors" if path.is_dir() else path)
    if not isinstance(config.get("adapter"), dict):
        raise ValueError(f"{path} holds no wrapped network: load it by load_denoiser")
    network = OwnNetwork(net, num_classes=config["num_classes"], call=call, **config["adapter"])
    denoiser = build_denoiser(config, network=network)
    load_state(denoiser, state, source=str(path))
    return _placed(denoiser, net)


def _placed(denoiser: NetworkDenoiser, net: nn.Module) -> NetworkDenoiser:
    """On the device of the network, in eval mode."""
    return denoiser.to(_device(net)).eval()


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device
