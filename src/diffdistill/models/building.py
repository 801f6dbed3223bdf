"""Denoisers from configs: plain values that say which network, preconditioning and range to build."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from diffdistill.denoiser import Denoiser, Distilled
from diffdistill.models.adm_unet import OpenAIUNet
from diffdistill.models.autoencoder import Autoencoder, build_autoencoder, freeze
from diffdistill.models.dhariwal_unet import DhariwalUNet
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.own.adapter import OwnNetwork
from diffdistill.models.own.registration import REGISTERED, UNREGISTERED
from diffdistill.models.preconditioning import make_preconditioning, noise_ends
from diffdistill.models.song_unet import SongUNet
from diffdistill.models.storage import MODEL
from diffdistill.registry import check_options, construct
from diffdistill.settings import check_names

W_CHANNELS = 64
"""Width of the embedding of a guidance weight, and its parameters, for networks that do not state their own."""
W_PARAMETERS = ("map_w.weight",)
S_CHANNELS = 64
"""Width of the embedding of the end of a step, of flow maps."""
S_PARAMETER = "map_s.weight"

NETWORKS: dict[str, Callable[..., nn.Module] | str] = {
    "song_unet": SongUNet,
    "dhariwal_unet": DhariwalUNet,
    "openai_unet": OpenAIUNet,
    "diffusers": "diffdistill.interop.diffusers.networks:diffusers_network",
}
"""How to build a network, by name: a class or function, or its import path."""

_REQUIRED = ("network", "preconditioning", "data_shape", "sigma_min", "sigma_max")
_OPTIONAL = ("format", "num_classes", "w_range", "distilled", "autoencoder", "latents", "adapter", "provenance")
ENTRIES = _REQUIRED + _OPTIONAL
"""What the config of a denoiser has."""


def build_denoiser(
    config: Mapping[str, Any], *, network: nn.Module | None = None, autoencoder: Autoencoder | None = None
) -> NetworkDenoiser:
    """Build a denoiser with fresh weights.

    Args:
        config: a mapping with
            `network`: `name`, one of `NETWORKS`, and its options; `img_resolution`, `img_channels` and `label_dim` are
            taken from the rest of the config unless given;
            `preconditioning`: `name`, one of `PRECONDITIONINGS`, and its options;
            `data_shape`; `sigma_min`, `sigma_max` (None: as `noise_ends` says); and optionally `num_classes` (0),
            `w_range`, `distilled` (`sigmas` and `sampler`, and `afs` and `others`), `autoencoder` (options of
            `Autoencoder`, for a denoiser of its latents), `latents` (true for a denoiser of latents whose autoencoder
            is elsewhere), `adapter` (for a registered network, options of `OwnNetwork`), `provenance` (anything that
            JSON holds).
        network: a network that was built as the config says, to take in place of a fresh one.
        autoencoder: what made the latents that are denoised; it becomes part of the denoiser and of its file, frozen.

    Returns:
        The denoiser, whose attribute `config` is the config with every default of this function filled in.

    Raises:
        ValueError: an unknown name, a key that is missing or unknown, an option out of range.
        TypeError: an option that the network or the preconditioning does not have.
    """
    config = resolved_config(config if autoencoder is None else {**config, "autoencoder": autoencoder.config})
    preconditioning, distilled = config["preconditioning"], config["distilled"]
    if autoencoder is None and "autoencoder" in config:
        autoencoder = build_autoencoder(config["autoencoder"])
    if network is None:
        network = _build_network(config)
    denoiser = NetworkDenoiser(
        network,
        make_preconditioning(preconditioning["name"], **_options(preconditioning)),
        data_shape=tuple(config["data_shape"]),
        num_classes=config["num_classes"],
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
        w_range=None if config["w_range"] is None else tuple(config["w_range"]),
        distilled=None if distilled is None else _distilled(distilled),
        autoencoder=None if autoencoder is None else freeze(autoencoder),
    )
    denoiser.config = config
    denoiser.latents = bool(config.get("latents"))
    return denoiser


def _build_network(config: Mapping[str, Any]) -> nn.Module:
    name, options = config["network"]["name"], _options(config["network"])
    if name == UNREGISTERED:
        raise ValueError(
            f"the network {options.get('kind')!r} {options.get('reason')}: build it, and give the file to "
            "diffdistill.wrap(net, weights=FILE)"
        )
    try:
        network = construct("network", name, NETWORKS, **options)
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"no network {name!r} can be built with {options}: {error}") from None
    if name not in REGISTERED:
        if config.get("adapter") is not None:
            raise ValueError(f"the network {name!r} is called as it is: leave out the entry 'adapter' of the config")
        return network
    call = REGISTERED[name].call
    check_options("an adapter", OwnNetwork, config["adapter"], positional=1)
    return OwnNetwork(network, num_classes=config["num_classes"], call=call, **config["adapter"])


def _distilled(plain: Mapping[str, Any]) -> Distilled:
    others = tuple(tuple(levels) for levels in plain.get("others", ()))
    return Distilled(tuple(plain["sigmas"]), plain["sampler"], bool(plain.get("afs", False)), others)


def _options(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "name"}


def resolved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of `config`, checked, with defaults filled in."""
    for key in _REQUIRED:
        if key not in config:
            raise ValueError(f"the config of a denoiser needs {key!r}: it has {', '.join(sorted(config)) or 'nothing'}")
    check_names("the config of a denoiser", config, _REQUIRED + _OPTIONAL, noun="entry", error=ValueError)
    # Through JSON, so that what is built is what a file gives back.
    resolved = json.loads(json.dumps(dict(config), default=_plain))
    if resolved.setdefault("format", MODEL.format) != MODEL.format:
        raise ValueError(f"model format {resolved['format']} is unknown: this version reads format {MODEL.format}")
    for part in ("network", "preconditioning"):
        if "name" not in resolved[part]:
            raise ValueError(f"the {part} of a denoiser needs a name")
    if None in (resolved["sigma_min"], resolved["sigma_max"]):
        ends = noise_ends(make_preconditioning(**resolved["preconditioning"]))
        for end, value in zip(("sigma_min", "sigma_max"), ends, strict=True):
            resolved[end] = value if resolved[end] is None else resolved[end]
    low, high = resolved["sigma_min"], resolved["sigma_max"]
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 < low < high):
        raise ValueError(f"the noise levels of a denoiser are 0 < sigma_min < sigma_max, not {low!r} and {high!r}")
    resolved.setdefault("num_classes", 0)
    resolved.setdefault("w_range", None)
    resolved.setdefault("distilled", None)
    if resolved.get("autoencoder") is None:
        resolved.pop("autoencoder", None)  # so that a denoiser of images has the fingerprint that it always had
    resolved.setdefault("provenance", None)
    name = resolved["network"]["name"]
    if name in REGISTERED:
        resolved["adapter"] = _adapter(name, resolved)
    known = inspect.signature(REGISTERED[name].make).parameters if name in REGISTERED else None
    shape = resolved["data_shape"]
    sizes = {"img_channels": shape[0], "img_resolution": shape[-1], "label_dim": resolved["num_classes"]}
    for option, value in sizes.items() if name != UNREGISTERED else ():
        if known is None or option in known:
            resolved["network"].setdefault(option, value)
    return resolved


def _adapter(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """How a registered network is called: what the config says, else what its registration does."""
    said, defaults = config.get("adapter") or {}, dict(REGISTERED[name].defaults)
    given = {option: value for option, value in said.items() if value is not None}
    time = defaults.pop("time", "index")
    if time == "unit":
        preconditioning = make_preconditioning(**config["preconditioning"])
        table = getattr(preconditioning, "table", None)
        defaults["time_scale"] = 1 / (getattr(preconditioning, "time_scale", 1.0) if table is None else len(table))
    defaults["integer_time"] = time == "integer"
    return {**defaults, **given}


def _plain(value: Any) -> Any:
    """What JSON does not know: mappings and sequences of other libraries, tensors."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Tensor):
        return value.tolist()
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"a config holds plain values only, not {type(value).__name__}") from None


def with_guidance_input(
    config: Mapping[str, Any], w_range: tuple[float, float], *, w_channels: int = W_CHANNELS
) -> dict[str, Any]:
    """The config of the same denoiser with a guidance weight in `w_range` as a further input.

    Raises:
        ValueError: the denoiser takes a guidance weight already, or the range is empty.
    """
    if config.get("w_range") is not None:
        raise ValueError(f"this denoiser takes a guidance weight already, in the range {list(config['w_range'])}")
    if len(w_range) != 2 or not w_range[0] <= w_range[1]:
        raise ValueError(f"w_range must be (least, greatest), but is {tuple(w_range)}")
    config = copy.deepcopy(dict(config))
    part = "adapter" if config.get("adapter") is not None else "network"
    config[part] = {**config[part], "w_channels": w_channels}
    return {**config, "w_range": [float(w) for w in w_range], "provenance": None}


def guidance_student(
    teacher: NetworkDenoiser, w_range: tuple[float, float], *, w_channels: int | None = None
) -> NetworkDenoiser:
    """A copy of `teacher` that takes a guidance weight in `w_range`, and ignores it until it is trained.

    At first it equals the conditional teacher for every w: the new parameters are zero (Meng et al. 2023, Section 3.1,
    start from the teacher's weights; the zero is ours).

    Args:
        teacher: the conditional model.
        w_range: the guidance weights that the student will be trained for.
        w_channels: width of the embedding of w, by default what networks of its kind have.

    Raises:
        ValueError: the teacher has no config, or takes a guidance weight already.
    """
    width = getattr(teacher.model, "default_w_channels", W_CHANNELS) if w_channels is None else w_channels
    config, network = with_guidance_input(config_of(teacher), w_range, w_channels=width), None
    if isinstance(teacher.model, OwnNetwork):
        network = copy.deepcopy(teacher.model)
        config["adapter"]["w_features"] = network.take_inputs(teacher.data_shape, w_channels=width)
    student = build_denoiser(config, network=network)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != [f"model.{name}" for name in getattr(student.model, "w_parameters", W_PARAMETERS)] or unexpected:
        raise ValueError(f"the teacher's weights do not fit its config: missing {missing}, unexpected {unexpected}")
    reference = next(teacher.parameters())
    return student.to(device=reference.device, dtype=reference.dtype)


def flow_map_student(teacher: NetworkDenoiser, *, s_channels: int = S_CHANNELS) -> NetworkDenoiser:
    """A copy of `teacher` that also takes `s`, the level that a step ends at, and ignores it until it is trained.

    At first it equals the teacher for every s.

    Args:
        teacher: the model of stage 1, or any other that was not distilled to a number of steps.
        s_channels: width of the embedding of s.

    Raises:
        ValueError: the teacher has no config, takes s already, or has a network that cannot take it.
    """
    if teacher.flow_map:
        raise ValueError("this denoiser takes the end of a step already: train it as it is")
    config = {**config_of(teacher), "distilled": None, "provenance": None}
    part, network = "network", None
    if isinstance(teacher.model, OwnNetwork):
        part, network = "adapter", copy.deepcopy(teacher.model)
        config["adapter"]["w_features"] = network.take_inputs(teacher.data_shape, s_channels=s_channels)
    try:
        config[part] = {**config[part], "s_channels": s_channels}
        student = build_denoiser(config, network=network)
    except TypeError:
        raise ValueError(
            f"a network {config['network']['name']!r} takes no end of a step s: choose a method that needs none, such "
            "as halving, trajectory or consistency"
        ) from None
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != [f"model.{getattr(student.model, 's_parameter', S_PARAMETER)}"] or unexpected:
        raise ValueError(f"the teacher's weights do not fit its config: missing {missing}, unexpected {unexpected}")
    reference = next(teacher.parameters())
    return student.to(device=reference.device, dtype=reference.dtype)


def config_of(denoiser: Denoiser) -> dict[str, Any]:
    """The config of a denoiser as it is now."""
    config = denoiser.config
    if config is None:
        raise ValueError(f"this {type(denoiser).__name__} has no config: build it with build_denoiser")
    distilled = denoiser.distilled
    plain: dict[str, Any] | None = None
    if distilled is not None:
        plain = {"sigmas": list(distilled.sigmas), "sampler": distilled.sampler}
        # What most students do not have is left out, so that their fingerprints stay as they are.
        plain |= {"afs": True} if distilled.afs else {}
        plain |= {"others": [list(levels) for levels in distilled.others]} if distilled.others else {}
    w_range = None if denoiser.w_range is None else list(denoiser.w_range)
    return {**copy.deepcopy(config), "distilled": plain, "w_range": w_range}
