"""What training programs put around a state dict: entries beside it, prefixes of its names, scales of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffdistill.interop.containers.records import ForeignFileError
from diffdistill.interop.containers.tensors import TensorRecord

AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "params_ema")
STATES = ("state_dict", "model_state_dict", "model", "module", "unet", "net", "params", "weights")
"""Entries of a checkpoint that are state dicts; those of averages come first."""
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "unet.", "net.", "denoiser.", "_forward_module.")
"""What wrappers put before every name: DataParallel, torch.compile, averages, Lightning."""
LATENT_DIFFUSION = "model.diffusion_model."
SCALES = (".scale_weight", ".weight_scale")
"""Ends of names of the scales of weights in 8 bits; those of activations end in "scale_input" or "input_scale"."""
MARKS = ("scaled_fp8",)
DEPTH = 4


def unwrapped(root: Any) -> Any:
    """The state dict within a checkpoint, under the names that its network gave; anything else as it is.

    Where there is an average of the weights beside them, it is taken.
    """
    for _ in range(DEPTH):
        inner = _inner(root)
        if inner is root:
            break
        root = inner
    if not isinstance(root, dict) or not _is_state(root):
        return root
    root = _without_prefixes(root)
    return with_scales(root) if any(str(name).endswith(SCALES) for name in root) else root


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, TensorRecord) for entry in value.values())


def _inner(root: Any) -> Any:
    """The entry of a dict that holds the state, if it is not the dict itself."""
    if not isinstance(root, dict):
        return root
    for name in (*AVERAGES, *STATES):
        value = root.get(name)
        if isinstance(value, dict) and (_is_state(value) or any(_is_state(value.get(each)) for each in STATES)):
            return value
    return root


def _without_prefixes(state: dict[Any, Any]) -> dict[Any, Any]:
    """Names without what all of them begin with, or those of an average among others (`ema_model.`)."""
    for _ in range(DEPTH):
        names = [name for name in state if isinstance(name, str) and isinstance(state[name], TensorRecord)]
        average = [name for name in names if name.startswith("ema_model.") and "." in name.removeprefix("ema_model.")]
        if average and len(average) < len(names):
            return _without_prefixes({name: state[name] for name in average})
        prefix = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix) if isinstance(name, str) else name: value for name, value in state.items()}
    inner = "diffusion_model."
    if any(str(name).startswith(inner) for name in state):
        return {f"model.{name}" if str(name).startswith(inner) else name: value for name, value in state.items()}
    if any("transformer_blocks" in str(name) for name in state) and "input_blocks.0.0.weight" in state:
        return {f"{LATENT_DIFFUSION}{name}": value for name, value in state.items()}  # a U-Net by itself
    return state


def with_scales(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Weights of 8 bits with the numbers that they are to be multiplied by, which are no entries of their own any more.

    Raises:
        ForeignFileError: a scale of no weight, or one that is not one number.
    """
    kept = {
        name: value
        for name, value in state.items()
        if name not in MARKS and not str(name).endswith((*SCALES, ".scale_input", ".input_scale"))
    }
    for name, scale in state.items():
        end = next((end for end in SCALES if str(name).endswith(end)), None)
        if end is None:
            continue
        weight = f"{name.removesuffix(end)}.weight"
        if not isinstance(kept.get(weight), TensorRecord):
            raise ForeignFileError(f"{name[:80]} is the scale of a weight that the file does not hold")
        if not isinstance(scale, TensorRecord) or scale.numel != 1:
            raise ForeignFileError(f"{name[:80]} is not one number: scales of rows or blocks are not read")
        kept[weight] = replace(kept[weight], scale=scale)
    return kept
