"""Models as files: one safetensors file, with the config that rebuilds the denoiser in its metadata."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser, Distilled
from diffdistill.models.adm_unet import OpenAIUNet
from diffdistill.models.autoencoder import Autoencoder, build_autoencoder, freeze
from diffdistill.models.dhariwal_unet import DhariwalUNet
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.preconditioning import make_preconditioning
from diffdistill.models.song_unet import SongUNet
from diffdistill.models.storage import DAMAGES, MODEL, load_state, shipped_models, write_model
from diffdistill.registry import construct

W_CHANNELS = 64
"""Width of the embedding of a guidance weight, and its parameters, for networks that do not state their own."""
W_PARAMETERS = ("map_w.weight",)

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "song_unet": SongUNet,
    "dhariwal_unet": DhariwalUNet,
    "openai_unet": OpenAIUNet,
}

_REQUIRED = ("network", "preconditioning", "data_shape", "sigma_min", "sigma_max")
_OPTIONAL = ("format", "num_classes", "w_range", "distilled", "autoencoder", "latents", "provenance")


def build_denoiser(
    config: Mapping[str, Any], *, network: nn.Module | None = None, autoencoder: Autoencoder | None = None
) -> NetworkDenoiser:
    """Build a denoiser with fresh weights.

    Args:
        config: a mapping with
            `network`: `name`, one of `NETWORKS`, and its options; `img_resolution`, `img_channels` and `label_dim` are
            taken from the rest of the config unless given;
            `preconditioning`: `name`, one of `PRECONDITIONINGS`, and its options;
            `data_shape`, `sigma_min`, `sigma_max`; and optionally `num_classes` (0), `w_range`, `distilled`
            (`sigmas` and `sampler`), `autoencoder` (options of `Autoencoder`, for a denoiser of its latents),
            `latents` (true for a denoiser of latents whose autoencoder is elsewhere), `provenance` (anything that
            JSON holds).
        network: a network that was built as the config says, to take in place of a fresh one.
        autoencoder: what made the latents that are denoised; it becomes part of the denoiser and of its file, frozen.

    Returns:
        The denoiser, whose attribute `config` is the config with every default of this function filled in.

    Raises:
        ValueError: an unknown name, a key that is missing or unknown, an option out of range.
        TypeError: an option that the network or the preconditioning does not have.
    """
    config = _resolve(config if autoencoder is None else {**config, "autoencoder": autoencoder.config})
    preconditioning, distilled = config["preconditioning"], config["distilled"]
    if autoencoder is None and "autoencoder" in config:
        autoencoder = build_autoencoder(config["autoencoder"])
    if network is None:
        name, options = config["network"]["name"], _options(config["network"])
        try:
            network = construct("network", name, NETWORKS, **options)
        except (RuntimeError, ArithmeticError) as error:
            raise ValueError(f"no network {name!r} can be built with {options}: {error}") from None
    denoiser = NetworkDenoiser(
        network,
        make_preconditioning(preconditioning["name"], **_options(preconditioning)),
        data_shape=tuple(config["data_shape"]),
        num_classes=config["num_classes"],
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
        w_range=None if config["w_range"] is None else tuple(config["w_range"]),
        distilled=None if distilled is None else Distilled(tuple(distilled["sigmas"]), distilled["sampler"]),
        autoencoder=None if autoencoder is None else freeze(autoencoder),
    )
    denoiser.config = config
    denoiser.latents = bool(config.get("latents"))
    return denoiser


def _options(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "name"}


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of `config`, checked, with defaults filled in."""
    for key in _REQUIRED:
        if key not in config:
            raise ValueError(f"the config of a denoiser needs {key!r}: it has {', '.join(sorted(config)) or 'nothing'}")
    for key in config:
        if key not in _REQUIRED + _OPTIONAL:
            valid = ", ".join(_REQUIRED + _OPTIONAL)
            raise ValueError(f"the config of a denoiser has no entry {key!r}: it takes {valid}")
    # Through JSON, so that what is built is what a file gives back.
    resolved = json.loads(json.dumps(dict(config), default=_plain))
    if resolved.setdefault("format", MODEL.format) != MODEL.format:
        raise ValueError(f"model format {resolved['format']} is unknown: this version reads format {MODEL.format}")
    for part in ("network", "preconditioning"):
        if "name" not in resolved[part]:
            raise ValueError(f"the {part} of a denoiser needs a name")
    low, high = resolved["sigma_min"], resolved["sigma_max"]
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 < low < high):
        raise ValueError(f"the noise levels of a denoiser are 0 < sigma_min < sigma_max, not {low!r} and {high!r}")
    resolved.setdefault("num_classes", 0)
    resolved.setdefault("w_range", None)
    resolved.setdefault("distilled", None)
    if resolved.get("autoencoder") is None:
        resolved.pop("autoencoder", None)  # so that a denoiser of images has the fingerprint that it always had
    resolved.setdefault("provenance", None)
    resolved["network"].setdefault("img_channels", resolved["data_shape"][0])
    resolved["network"].setdefault("img_resolution", resolved["data_shape"][-1])
    resolved["network"].setdefault("label_dim", resolved["num_classes"])
    return resolved


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
    config["network"] = {**config["network"], "w_channels": w_channels}
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
    student = build_denoiser(with_guidance_input(_config(teacher), w_range, w_channels=width))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != [f"model.{name}" for name in getattr(student.model, "w_parameters", W_PARAMETERS)] or unexpected:
        raise ValueError(f"the teacher's weights do not fit its config: missing {missing}, unexpected {unexpected}")
    reference = next(teacher.parameters())
    return student.to(device=reference.device, dtype=reference.dtype)


def _config(denoiser: Denoiser) -> dict[str, Any]:
    """The config of a denoiser as it is now."""
    config = getattr(denoiser, "config", None)
    if config is None:
        raise ValueError(f"this {type(denoiser).__name__} has no config: build it with build_denoiser")
    distilled = denoiser.distilled
    plain = None if distilled is None else {"sigmas": list(distilled.sigmas), "sampler": distilled.sampler}
    w_range = None if denoiser.w_range is None else list(denoiser.w_range)
    return {**copy.deepcopy(config), "distilled": plain, "w_range": w_range}


def save_denoiser(
    denoiser: NetworkDenoiser, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write weights and config to one safetensors file, whole or not at all.

    Args:
        denoiser: from `build_denoiser` or `load_denoiser`.
        path: of the file, which ends in .safetensors, or of a folder, in which it is `model.safetensors`.
        provenance: what made these weights, such as command and metrics; by default that of the config.

    Raises:
        ValueError: the denoiser has no config.
    """
    config = _config(denoiser)
    if provenance is not None:
        config["provenance"] = dict(provenance)
    write_model(path, denoiser, _resolve(config))


def load_denoiser(name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Denoiser:
    """Load a denoiser, ready for evaluation.

    Args:
        name_or_path: the name of a shipped model (`shipped_models()` lists them), a file, or a folder that holds
            `model.safetensors`.
        device: where to put it.

    Raises:
        ValueError: there is no such model, or the file is truncated, of another format or another architecture.
    """
    shipped = shipped_models()
    name = os.fspath(name_or_path)
    path = shipped.get(name, Path(name))
    if path.is_dir():
        key = next((key for key in READERS if (path / key).is_file()), None)
        if key is None:
            raise ValueError(f"the folder {path} holds no model: expected one of {', '.join(_keys(folder=True))} in it")
        path = path / key
    elif path.is_file():
        key = path.suffix
        if key not in READERS:
            raise ValueError(f"cannot read {path}: models end in {', '.join(_keys(folder=False))}")
    else:
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(sorted(shipped)) or '(none shipped)'}, or give the path "
            "of a file or folder"
        )
    # Channels last, because convolutions are faster so, on CPU as on GPU.
    denoiser = READERS[key](path).to(device).eval()
    denoiser.source = name if name in shipped else str(path)
    return denoiser.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _keys(*, folder: bool) -> list[str]:
    return [key for key in READERS if key.startswith(".") != folder]


def read_safetensors(path: Path) -> NetworkDenoiser:
    """Read a file that `save_denoiser` wrote, strictly.

    Raises:
        ValueError: as `load_denoiser`.
    """
    config, state = MODEL.read(path)
    if "network" not in config and config.get("autoencoder") is not None:
        raise ValueError(f"{path} holds an autoencoder, not a denoiser")
    try:
        denoiser = build_denoiser(config)
    except DAMAGES as error:
        raise ValueError(f"the config in {path} builds no model: {' '.join(str(error).split())[:300]}") from None
    load_state(denoiser, state, source=str(path))
    return denoiser


READERS: dict[str, Callable[[Path], Denoiser]] = {
    ".safetensors": read_safetensors,
    "model.safetensors": read_safetensors,
}
"""How to read a model: by the suffix of a file, or by the name of a file that a folder holds. Given that file."""


def fingerprint(denoiser: nn.Module) -> str:
    """A short hash of config and weights, for predictors to record which model they belong to.

    It is computed once, and again when a tensor was replaced or written to.
    """
    digest = hashlib.sha256()
    if isinstance(denoiser, Denoiser) and getattr(denoiser, "config", None) is not None:
        config = {key: value for key, value in _config(denoiser).items() if key != "provenance"}
        digest.update(json.dumps(config, sort_keys=True).encode())
    state = sorted(denoiser.state_dict().items())
    now = digest.hexdigest(), [(value.dtype, value.data_ptr(), value._version) for _, value in state]
    then, known = _FINGERPRINTS.get(denoiser, (None, ""))
    if now == then:
        return known
    for name, value in state:
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    known = digest.hexdigest()[:16]
    _FINGERPRINTS[denoiser] = now, known
    return known


_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
