"""The pickles of EDM (Karras et al. 2022) and of the official AMED-Solver (Zhou et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import ForeignFileError, Record
from diffdistill.interop.formats.building import (
    ALWAYS_LABELLED,
    ForeignModel,
    bounded_int,
    build_strictly,
    check_size,
    finite_float,
    load_strictly,
    module_state,
    sizes_of,
)
from diffdistill.solvers.amed import AMEDPredictor

NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}

_SIGMAS = (0.002, 80.0)
"""Range of the EDM models, whose files say 0 to infinity (Karras et al. 2022, Table 1)."""

_WHOLE = ("augment_dim", "model_channels", "channel_mult_emb", "num_blocks", "channel_mult_noise")
_LISTS = ("channel_mult", "attn_resolutions", "resample_filter")
_TEXTS = ("embedding_type", "encoder_type", "decoder_type")
# Options that change nothing after training.
_IGNORED = ("img_resolution", "in_channels", "out_channels", "label_dim", "label_dropout")


def find_module(root: Any) -> Record | None:
    """The network in a pickle: under `ema`, `model` or `net`, or the pickle itself."""
    if isinstance(root, dict):
        root = next((root[key] for key in ("ema", "model", "net") if isinstance(root.get(key), Record)), None)
    return root if isinstance(root, Record) else None


def read_edm(checkpoint: ForeignCheckpoint) -> ForeignModel:
    """Read a denoiser of the EDM release, or a predictor of AMED.

    Iddpm models keep the rounding of sigma to the nearest trained level, as published: `preconditioning.noise_level`
    can be set to "interpolate".

    Raises:
        ForeignFileError: it is neither, or is damaged.
    """
    record = find_module(checkpoint.root)
    if record is None:
        keys = (
            ", ".join(str(key)[:40] for key in checkpoint.root) if isinstance(checkpoint.root, dict) else "no entries"
        )
        raise ForeignFileError(f"the pickle holds no network under ema, model or net: it holds {keys}")
    if record.kind == "AMED_predictor":
        return _read_predictor(record, checkpoint)
    if record.kind not in PRECONDITIONINGS:
        raise ForeignFileError(
            f"the network is a {record.kind[:80]}: choose one of {', '.join([*PRECONDITIONINGS, 'AMED_predictor'])}"
        )
    network = record.state.get("_modules", {}).get("model") if isinstance(record.state.get("_modules"), dict) else None
    if not isinstance(network, Record) or network.kind not in NETWORKS:
        kind = network.kind if isinstance(network, Record) else type(network).__name__
        raise ForeignFileError(f"the network in {record.kind} is a {kind[:80]}: choose one of {', '.join(NETWORKS)}")
    state = record.state
    channels = bounded_int(state.get("img_channels"), "img_channels", low=1)
    resolution = bounded_int(state.get("img_resolution"), "img_resolution", low=1)
    num_classes = bounded_int(state.get("label_dim"), "label_dim")
    preconditioning, (sigma_min, sigma_max) = PRECONDITIONINGS[record.kind](state)
    records = module_state(record)
    records.pop("u", None)  # iDDPM's noise levels, which follow from its other settings
    outputs = 2 * channels if record.kind == "iDDPMPrecond" else channels
    config = {
        "network": {"name": NETWORKS[network.kind], "out_channels": outputs, **_options(network)},
        "preconditioning": preconditioning,
        "data_shape": [channels, resolution, resolution],
        "num_classes": num_classes,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "provenance": {"format": "edm", "class": record.kind, "source_sha256": record.source_sha256},
    }
    denoiser = build_strictly(config, records, checkpoint)
    description = (
        f"EDM pickle: {network.kind} in {record.kind}, {sizes_of(config)}, sigma {sigma_min:g} to {sigma_max:g}"
    )
    if num_classes and not network.state["_init_kwargs"].get("label_dropout"):
        description += ALWAYS_LABELLED
    return ForeignModel("edm", denoiser, description)


def _options(network: Record) -> dict[str, Any]:
    """The constructor's arguments that the network's record carries, checked."""
    given = network.state.get("_init_kwargs")
    if not isinstance(given, dict):
        raise ForeignFileError(f"{network.kind} carries no arguments of its constructor")
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in _WHOLE:
            options[name] = bounded_int(value, name)
        elif name in _LISTS:
            if not isinstance(value, (list, tuple)) or len(value) > 16:
                raise ForeignFileError(f"{name} of {network.kind} is not a short list")
            low = 0 if name == "attn_resolutions" else 1
            options[name] = [bounded_int(item, name, low=low) for item in value]
        elif name in _TEXTS and isinstance(value, str):
            options[name] = value
        elif name == "dropout":
            options[name] = finite_float(value, name)
        elif name not in _IGNORED:
            raise ForeignFileError(f"{network.kind} has an unknown option {str(name)[:40]!r}")
    check_size(len(options.get("channel_mult", [1] * 4)), options.get("num_blocks", 4))
    return options


def _edm(state: dict[Any, Any]) -> tuple[dict[str, Any], tuple[float, float]]:
    low, high = state.get("sigma_min"), state.get("sigma_max")
    low = _SIGMAS[0] if low == 0 else finite_float(low, "sigma_min", positive=True)
    high = _SIGMAS[1] if high == float("inf") else finite_float(high, "sigma_max", positive=True)
    sigma_data = finite_float(state.get("sigma_data"), "sigma_data", positive=True)
    return {"name": "edm", "sigma_data": sigma_data}, (low, high)


def _range(state: dict[Any, Any]) -> tuple[float, float]:
    low = finite_float(state.get("sigma_min"), "sigma_min", positive=True)
    return low, finite_float(state.get("sigma_max"), "sigma_max", positive=True)


def _vp(state: dict[Any, Any]) -> tuple[dict[str, Any], tuple[float, float]]:
    options = {name: finite_float(state.get(name), name, positive=True) for name in ("beta_d", "beta_min")}
    return {"name": "vp", **options, "steps": bounded_int(state.get("M"), "M", low=2)}, _range(state)


def _ve(state: dict[Any, Any]) -> tuple[dict[str, Any], tuple[float, float]]:
    return {"name": "ve"}, _range(state)


def _iddpm(state: dict[Any, Any]) -> tuple[dict[str, Any], tuple[float, float]]:
    options = {
        "c1": finite_float(state.get("C_1"), "C_1", positive=True),
        "c2": finite_float(state.get("C_2"), "C_2", positive=True),
    }
    steps = bounded_int(state.get("M"), "M", low=2)
    return {"name": "iddpm", **options, "steps": steps, "noise_level": "nearest"}, _range(state)


PRECONDITIONINGS: dict[str, Callable[[dict[Any, Any]], tuple[dict[str, Any], tuple[float, float]]]] = {
    "EDMPrecond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}

_PREDICTOR_SETTINGS = (
    *("dataset_name", "img_resolution", "num_steps", "sampler_tea", "sampler_stu", "M", "guidance_type"),
    *("guidance_rate", "schedule_type", "schedule_rho", "afs", "max_order", "predict_x0", "lower_order_final"),
)


def _read_predictor(record: Record, checkpoint: ForeignCheckpoint) -> ForeignModel:
    bounds = {name: finite_float(record.state.get(name), name) for name in ("scale_dir", "scale_time")}
    try:
        predictor = AMEDPredictor(scale_dir=bounds["scale_dir"], scale_time=bounds["scale_time"])
    except ValueError as error:
        raise ForeignFileError(str(error)) from None
    load_strictly(predictor, module_state(record), checkpoint)
    settings = {name: record.state.get(name) for name in _PREDICTOR_SETTINGS}
    plain = {
        name: value for name, value in settings.items() if value is None or isinstance(value, (bool, int, float, str))
    }
    description = (
        f"AMED predictor for {plain.get('dataset_name')}: {plain.get('sampler_stu')} with {plain.get('num_steps')} "
        f"points, taught by {plain.get('sampler_tea')}"
    )
    return ForeignModel("amed-predictor", None, description, other=predictor.eval(), settings={**plain, **bounds})
