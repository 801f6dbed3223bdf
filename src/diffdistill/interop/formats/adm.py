"""ADM and its classifiers (Dhariwal and Nichol 2021), and consistency models (Song et al. 2023): flat state dicts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import one_line
from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord
from diffdistill.interop.formats.building import ALWAYS_LABELLED, ForeignModel, build_strictly, load_strictly, sizes_of
from diffdistill.interop.formats.unets import Architecture, Hints, infer
from diffdistill.models.classifier import EncoderUNet, NoisyClassifier
from diffdistill.models.preconditioning import make_preconditioning
from diffdistill.solvers.discrete_time import make_table

PUBLISHED: dict[tuple[float, ...], Hints] = {
    (1, 2, 3, 4): Hints(image_size=64, attention_order="qkv_first", noise_levels="iddpm"),
    (1, 1, 2, 3, 4): Hints(image_size=128, num_heads=4),
    (1, 1, 2, 2, 4, 4): Hints(image_size=256),
    (0.5, 1, 1, 2, 2, 4, 4): Hints(image_size=512),
}
"""The released ADM models by their `channel_mult`: those of ImageNet and LSUN, all with residual resampling. What a row
leaves out is as for most."""

_SIGMAS = (0.002, 80.0)
"""Range of the consistency models (Song et al. 2023, Section 6.1)."""


def read_adm(checkpoint: ForeignCheckpoint, path: Path, hints: Hints | None = None) -> ForeignModel:
    """Read a flat state dict of ADM, of one of its classifiers, or of the code of consistency models.

    Consistency models and the EDM teachers beside them have the same parameters: `hints.family`, or else the first word
    of the file's name ("edm", "cd" or "ct") tells which it is.

    Raises:
        ForeignFileError: it is none of these, is damaged, or needs a hint.
    """
    records = checkpoint.root
    if not isinstance(records, dict) or not all(
        isinstance(key, str) and isinstance(value, TensorRecord) for key, value in records.items()
    ):
        raise ForeignFileError("the file holds no flat state dict")
    hints = hints or Hints()
    if "out.2.positional_embedding" in records:
        return _read_classifier(records, checkpoint, hints)
    architecture = infer(records)
    if architecture.context_dim:
        raise ForeignFileError("the network has transformers: latent diffusion is read from whole .ckpt files")
    if architecture.planar_attention:
        return _read_consistency(architecture, records, checkpoint, path, hints)
    return _read_diffusion(architecture, records, checkpoint, hints)


def _read_diffusion(
    architecture: Architecture, records: Mapping[str, Any], checkpoint: ForeignCheckpoint, hints: Hints
) -> ForeignModel:
    channels = architecture.img_channels
    if architecture.out_channels not in (channels, 2 * channels) or channels == 6:
        raise ForeignFileError(
            f"the network maps {channels} channels to {architecture.out_channels}: upsamplers are not read"
        )
    # The models of improved-diffusion have the widths of published ones, but strided convolutions and other heads.
    published = PUBLISHED.get(architecture.channel_mult) if architecture.resample == "residual" else None
    hints = hints.over(published or Hints())
    table = hints.noise_levels or "linear"
    sigma_min, sigma_max = (float(level) for level in make_table(table)[[0, -1]])
    config = _config(architecture, hints, sigma_min, sigma_max)
    config["preconditioning"] = {"name": "eps", "table": table}
    config["provenance"] = {"format": "adm"}
    denoiser = build_strictly(config, _prefixed(records), checkpoint)
    variance = " and the variance" if architecture.out_channels > channels else ""
    text = f"ADM, predicting the noise{variance}, {sizes_of(config)}, noise levels {table}"
    return ForeignModel("adm", denoiser, text + ALWAYS_LABELLED * bool(architecture.label_dim))


def _read_consistency(
    architecture: Architecture, records: Mapping[str, Any], checkpoint: ForeignCheckpoint, path: Path, hints: Hints
) -> ForeignModel:
    beginning = re.split("[^a-z]", path.name.lower())[0]
    family = hints.family or {"edm": "edm", "cd": "consistency", "ct": "consistency"}.get(beginning)
    if family is None:
        raise ForeignFileError(
            "the parameters fit a consistency model and an EDM teacher alike: give family=consistency or family=edm"
        )
    published = Hints(image_size=PUBLISHED.get(architecture.channel_mult, Hints()).image_size)
    hints = hints.over(Hints(image_size=published.image_size, attention_order="qkv_first"))
    sigma_min, sigma_max = _SIGMAS
    config = _config(architecture, hints, sigma_min, sigma_max)
    boundary = sigma_min if family == "consistency" else 0.0
    config["preconditioning"] = {"name": "edm", "sigma_data": 0.5, "time_scale": 1000.0, "boundary": boundary}
    config["provenance"] = {"format": "consistency_models", "family": family}
    if family == "consistency":
        # One evaluation at the highest level gives the image.
        config["distilled"] = {"sigmas": [sigma_max, 0.0], "sampler": "deterministic"}
    denoiser = build_strictly(config, _prefixed(_linear_attention(records)), checkpoint)
    what = "consistency model" if family == "consistency" else "EDM model in the layout of consistency models"
    text = f"{what}, {sizes_of(config)}" + ALWAYS_LABELLED * bool(architecture.label_dim)
    return ForeignModel("consistency" if family == "consistency" else "edm", denoiser, text)


def _read_classifier(records: Mapping[str, Any], checkpoint: ForeignCheckpoint, hints: Hints) -> ForeignModel:
    architecture = infer(records, decoder=False)
    positions = records["out.2.positional_embedding"].size
    side = math.isqrt(positions[1] - 1) if len(positions) == 2 and positions[1] > 1 else 0
    size = side << (len(architecture.channel_mult) - 1)
    # The classifiers have the resolution of their models, and their order of channels by default.
    schedule = PUBLISHED.get(architecture.channel_mult, Hints()).noise_levels
    hints = hints.over(Hints(image_size=size or None, noise_levels=schedule))
    options = architecture.options(hints)
    options |= {"img_resolution": hints.image_size, "img_channels": architecture.img_channels}
    options |= {"num_classes": architecture.out_channels}
    try:
        with torch.device("meta"):
            skeleton = EncoderUNet(**options)
        expected = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        if expected != {name: record.size for name, record in records.items()}:
            raise ForeignFileError("the classifier has another architecture than its parameters' names say")
        network = EncoderUNet(**options)
    except (TypeError, RuntimeError) as error:
        raise ForeignFileError(f"the classifier cannot be built: {one_line(error)}") from None
    load_strictly(network, records, checkpoint)
    table = hints.noise_levels or "linear"
    classifier = NoisyClassifier(
        network, make_preconditioning("eps", table=table), num_classes=architecture.out_channels
    ).eval()
    text = f"ADM classifier of {architecture.out_channels} classes, {size}x{size}, noise levels {table}"
    return ForeignModel("classifier", None, text, other=classifier)


def _config(architecture: Architecture, hints: Hints, sigma_min: float, sigma_max: float) -> dict[str, Any]:
    options = architecture.options(hints)
    return {
        "network": {"name": "openai_unet", "out_channels": architecture.out_channels, **options},
        "data_shape": [architecture.img_channels, hints.image_size, hints.image_size],
        "num_classes": architecture.label_dim,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }


def _prefixed(records: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": record for name, record in records.items()}


def _linear_attention(records: Mapping[str, Any]) -> dict[str, Any]:
    """Convolutions of one pixel over the plane, as ones over the line of positions."""

    def linear(name: str, record: TensorRecord) -> TensorRecord:
        if name.endswith((".qkv.weight", ".proj_out.weight")) and record.size[2:] == (1, 1):
            return TensorRecord(record.storage, record.offset, record.size[:3], record.stride[:3])
        return record

    return {name: linear(name, record) for name, record in records.items()}
