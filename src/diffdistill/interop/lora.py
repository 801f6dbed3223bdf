"""Low-rank adapters (Hu et al. 2022) in files of others, added to the weights that they adapt.

Read are the namings of the kohya tools, of diffusers and of peft. Nothing of a file is executed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.interop.containers.checkpoints import open_checkpoint
from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import ArrayRecord, TensorRecord
from diffdistill.interop.formats.stable_names import lora_name

logger = logging.getLogger(__name__)
D = TypeVar("D", bound=Denoiser)

DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")
FACTOR = re.compile(
    rf"^(?P<layer>.+?)[._](?P<part>{'|'.join(re.escape(n) for n in (*DOWN, *UP))})(\.default(_\d+)?)?(\.weight)?$"
)
OLD_FACTOR = re.compile(r"^(?P<block>.+)\.processor\.(?P<layer>to_(?:q|k|v|out))_lora\.(?P<part>down|up)\.weight$")
PREFIXES = (
    "base_model.model.",
    "unet.",
    "transformer.",
    "diffusion_model.",
    "model.",
    "lora_unet_",
    "lora_transformer_",
)
TEXTS = ("text_encoder", "lora_te", "te_", "te1_", "te2_", "conditioner.", "clip_")
"""Beginnings of the names of adapters for text encoders, which are no part of a denoiser."""
OTHERS = {"lora_mid": "a factor in the middle", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
"""What shows that a file holds something else than the product of two factors."""


@dataclass
class _Adapter:
    """The factors of one adapter: it adds `alpha / rank` times `up @ down`."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def product(self, shape: torch.Size) -> Tensor | None:
        """What is added to a weight of this shape; None if it does not fit."""
        if self.down is None or self.up is None or self.down.shape[0] != self.up.shape[1]:
            return None
        rank = self.down.shape[0]
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return None if product.numel() != shape.numel() or len(product) != shape[0] else scale * product.reshape(shape)


@dataclass
class _File:
    adapters: dict[str, _Adapter] = field(default_factory=dict)
    texts: int = 0


def add_lora(denoiser: D, path: str | os.PathLike[str], *, strength: float = 1.0) -> D:
    """Add the adapters of a file to the weights of a denoiser, which is changed and returned.

    Args:
        denoiser: from `load_denoiser`; guided and guidance-conditioned ones too.
        path: a `.safetensors`, or another checkpoint, with adapters.
        strength: what they are multiplied by; 0 changes nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no adapters, some that are not read, or some that name layers that the network has not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapters at {str(path)!r}")
    if not isinstance(strength, (int, float)) or not abs(strength) < float("inf"):
        raise ValueError(f"lora_strength must be a finite number, but is {strength!r}")
    network: Any = getattr(denoiser, "model", denoiser)
    network = getattr(network, "module", network)
    found, layers = _read(path), _layers(network)
    kind, total = type(network).__name__, len(found.adapters)
    if found.texts:
        logger.warning("%s: %d tensors of text encoders are left out: a denoiser has none", path, found.texts)
    places = {name: _place(name, layers, network) for name in found.adapters}
    strangers = [name for name, layer in places.items() if layer is None]
    if not total:
        raise ValueError(f"{path} holds no adapters for {kind}, but those of text encoders alone")
    if strangers:
        fit = "none fits" if len(strangers) == total else f"{len(strangers)} fit no layer of"
        raise ValueError(f"of the {total} adapters in {path} {fit} {kind}: the first is {strangers[0]}")
    with torch.no_grad():
        changes = {name: adapter.product(layers[places[name]].weight.shape) for name, adapter in found.adapters.items()}
        wrong = next((name for name, change in changes.items() if change is None), None)
        if wrong is not None:
            raise ValueError(f"{path}: the adapter {wrong} does not fit its layer of {kind}: it is of another model")
        for name, change in changes.items():
            weight = layers[places[name]].weight
            weight += strength * change.to(weight)  # pyright: ignore[reportOptionalMemberAccess]
    config = getattr(denoiser, "config", None)
    if config is not None:
        given = [*(config.get("provenance") or {}).get("lora", []), {"file": path.name, "strength": strength}]
        config["provenance"] = {**(config.get("provenance") or {}), "lora": given}
    logger.info("%s: %d adapters of %s, times %g", path, total, kind, strength)
    return denoiser


def _layers(network: nn.Module) -> dict[str, Any]:
    """The layers with a weight, by their names, also those that have adapters of their own."""
    weights = {name: getattr(module, "weight", None) for name, module in network.named_modules()}
    return {
        name.removesuffix(".base_layer"): network.get_submodule(name)
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and weight.ndim > 1
    }


def _place(name: str, layers: Mapping[str, Any], network: Any) -> Any:
    """The layer that an adapter names: with points, with underscores for points, or as the original code names it."""
    underscored = {layer.replace(".", "_"): layer for layer in layers}
    stripped = {name}
    for _ in range(3):
        stripped |= {each.removeprefix(prefix) for each in stripped for prefix in PREFIXES}
    blocks = getattr(getattr(network, "config", None), "layers_per_block", None)
    for each in sorted(stripped, key=len, reverse=True):
        if each in layers:
            return each
        flat = each.replace(".", "_")
        for candidate in (flat, lora_name(flat, blocks) if isinstance(blocks, int) else flat):
            if candidate in underscored:
                return underscored[candidate]
    return None


def _read(path: Path) -> _File:
    """The adapters of a file by the layers that they name."""
    found = _File()
    with open_checkpoint(path) as checkpoint:
        records = {str(name): value for name, value in checkpoint.state.items()}
        for mark, kind in OTHERS.items():
            name = next((name for name in records if f".{mark}" in name or f"_{mark}" in name), None)
            if name is not None:
                raise ForeignFileError(f"{path} holds adapters of a form that is not read ({kind}: {name[:80]})")
        tensors = checkpoint.tensors({n: r for n, r in records.items() if isinstance(r, (TensorRecord, ArrayRecord))})
    alphas = {}
    for name, tensor in tensors.items():
        if name.startswith(TEXTS):
            found.texts += 1
            continue
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
            continue
        layer, part = _factor(name)
        if layer is None:
            raise ForeignFileError(f"{path} holds no adapters, or some that are not read: the first is {name[:80]}")
        setattr(found.adapters.setdefault(layer, _Adapter()), part, tensor)
    for layer, alpha in alphas.items():
        if layer in found.adapters:
            found.adapters[layer].alpha = alpha
    _set_alpha_beside(path, found)
    return found


def _factor(name: str) -> tuple[str | None, str]:
    """The layer that a factor belongs to, and which of the two it is."""
    old = OLD_FACTOR.match(name)
    if old is not None:
        layer = old["layer"] + (".0" if old["layer"] == "to_out" else "")
        return f"{old['block']}.{layer}", old["part"]
    match = FACTOR.match(name)
    return (None, "") if match is None else (match["layer"], "down" if match["part"] in DOWN else "up")


def _set_alpha_beside(path: Path, found: _File) -> None:
    """The alpha of peft, which lies in a file beside the adapters."""
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        return
    try:
        settings = dict(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ForeignFileError(f"{beside} cannot be read") from None
    if settings.get("alpha_pattern") or settings.get("use_dora"):
        raise ForeignFileError(f"{beside} asks for alpha_pattern or use_dora, which are not read")
    alpha = settings.get("lora_alpha")
    for adapter in found.adapters.values():
        if adapter.alpha is None and adapter.down is not None and isinstance(alpha, (int, float)):
            # With use_rslora the product is divided by the square root of the rank.
            adapter.alpha = alpha * (len(adapter.down) ** 0.5 if settings.get("use_rslora") else 1.0)
