"""Low-rank adapters (Hu et al. 2022) for networks of diffusers: a student that differs from its teacher by little.

The base stays frozen; what is trained is the adapters and what takes the guidance weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffdistill.errors import one_line
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.registry import construct

if TYPE_CHECKING:
    from diffdistill.models.network import NetworkDenoiser

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("time_emb_proj", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)
"""Ends of the names of the layers of UNets and transformers: attention, feed-forward, time, convolutions."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The settings of a network's low-rank adapters.

    Attributes:
        rank: of every adapter.
        alpha: an adapter adds `alpha / rank` times its product; None for `rank`.
        targets: ends of the names of the layers that get one.

    Raises:
        ValueError: a rank or alpha that is not positive, or no targets.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora.rank must be a positive integer, but is {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha must be a positive number or null, but is {self.alpha!r}")
        if not self.targets:
            raise ValueError("lora.targets is empty: name the layers that get an adapter")

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def inject(module: nn.Module, options: Mapping[str, Any]) -> Adapters:
    """Give a network of diffusers adapters that change nothing yet, the same ones every time.

    Raises:
        ValueError: options out of range, or no layer has such a name.
        ImportError: peft is missing.
    """
    adapters = construct("adapters", "lora", {"lora": Adapters}, **options)
    peft = diffusers("peft")
    config = peft.LoraConfig(
        r=adapters.rank, lora_alpha=adapters.scale * adapters.rank, target_modules=list(adapters.targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(config, module)
        except ValueError as error:
            names = ", ".join(adapters.targets)
            raise ValueError(
                f"adapters do not fit {type(module).__name__} with lora.targets={names}: {one_line(error)}"
            ) from None
    return adapters


def add_adapters(denoiser: NetworkDenoiser, **options: Any) -> NetworkDenoiser:
    """Give a denoiser of diffusers adapters, freeze the rest, and return it. At first it computes what it did.

    Args:
        denoiser: from `from_pipeline`, `guidance_student` or `load_denoiser`; it is changed.
        options: those of `Adapters`.

    Raises:
        ValueError: a network that is not of diffusers, or has other adapters already.
    """
    network: Any = denoiser.model
    if not hasattr(network, "lora"):
        raise ValueError(f"adapters are for networks of diffusers, not for {type(network).__name__}: leave out lora")
    wanted = construct("adapters", "lora", {"lora": Adapters}, **options)
    if network.lora is None:
        network.lora = inject(network.module, options)
        _record(denoiser, dataclasses.asdict(wanted))
    elif network.lora != wanted:
        raise ValueError(
            f"the model has adapters of rank {network.lora.rank} already, with other settings than {dict(options)}: "
            "keep those, or merge them first (merge_adapters)"
        )
    network.unfreeze()
    return denoiser


def merge_adapters(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """Add the adapters to the weights they adapt, and return the denoiser, which is changed: one without adapters."""
    network: Any = denoiser.model
    if getattr(network, "lora", None) is not None:
        remove(network.module, merge=True)
        network.lora = None
        network.unfreeze()
        _record(denoiser, None)
    return denoiser


def _record(denoiser: NetworkDenoiser, lora: Mapping[str, Any] | None) -> None:
    config: Any = denoiser.config
    denoiser.config = {**config, "network": {**config["network"], "lora": None if lora is None else dict(lora)}}


def remove(module: nn.Module, *, merge: bool) -> None:
    """Put the layers back that have adapters, with (`merge`) or without what the adapters add."""
    layers = _layers(module)
    for name, layer in layers.items():
        if merge:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def _layers(module: nn.Module) -> dict[str, Any]:
    kind = diffusers("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kind)}


def adapter_state(module: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """The adapters of a network as `save_lora_weights` of stock pipelines takes them, with the scale in `lora_B`."""
    state = diffusers("peft.utils").get_peft_model_state_dict(module)
    return {
        name: (value * adapters.scale if ".lora_B." in name else value).detach().cpu().contiguous()
        for name, value in state.items()
    }
