"""Folders of diffusers, which may be a stranger's: what they name is checked before any of it is loaded."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from diffdistill.errors import one_line
from diffdistill.files.remote import local_path
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.interop.diffusers.networks import FAMILIES
from diffdistill.interop.diffusers.parts import Parts, from_network, from_pipeline
from diffdistill.models.network import NetworkDenoiser
from diffdistill.registry import choose

ADAPTERS = "pytorch_lora_weights.safetensors"
"""What stock pipelines name the file of a pipeline's adapters."""
SCHEDULER = "scheduler_config.json"
STABLE_DIFFUSION = (768, 2048)
"""Widths of the text of Stable Diffusion 1 and XL, which predict eps; for that of 2, 1024, there are two ways."""
OWN = "diffdistill.interop.diffusers."
DAMAGES = (
    pickle.UnpicklingError,
    OSError,
    ValueError,
    RuntimeError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    SafetensorError,
)
"""What the loading of a damaged folder ends in."""


def load_pipeline(folder: str | Path, **options: Any) -> Parts:
    """Load a diffusers folder, in float32; no code of the folder runs.

    Weights are safetensors, or, in parts without these, `.bin`, which torch reads with weights_only.

    Args:
        folder: it holds `model_index.json`. What `hf:OWNER/NAME` names is fetched first, see `files.remote`.
        options: those of `from_pipeline`.

    Raises:
        ValueError: the folder is damaged, holds code, or is of a kind that is not read.
        ImportError: the extra is missing.
    """
    library = diffusers()
    folder = local_path(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        _check(folder, index)
        absent = {name: None for name, entry in index.items() if entry == [None, None] or name == "safety_checker"}
        pipeline = library.DiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=_variant(folder),
            **{**absent, **_pickled(folder, index)},
        )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.float()  # transformers 5 leaves its models as they are stored
        if (folder / ADAPTERS).is_file():  # of a student whose adapters lie apart
            pipeline.load_lora_weights(folder, weight_name=ADAPTERS)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        missing = next((name for name, parameter in _parameters(pipeline) if parameter.is_meta), None)
        if missing is not None:
            raise ValueError(f"the weights of {missing} are missing")
        return from_pipeline(pipeline, **options)
    except DAMAGES as error:
        raise ValueError(f"cannot read the diffusers folder {folder}: {one_line(error)}") from None


def _holds_pickles(part: Path) -> bool:
    """Whether the weights of a part are `.bin` alone."""
    return any(part.glob("*.bin")) and not any(part.glob("*.safetensors"))


def _pickled(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline whose weights are pickles of tensors, which torch reads with weights_only."""
    loaded = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and _holds_pickles(folder / name):
            kind = getattr(diffusers(str(entry[0])), str(entry[1]), None)
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ValueError(f"{name} is of no network of {entry[0]}")
            options = {"variant": variant} if (variant := _variant_of(folder / name)) else {}
            loaded[name] = kind.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                folder / name, local_files_only=True, use_safetensors=False, **options
            )
    return loaded


def _variant(folder: Path) -> str | None:
    """The variant of the weights, such as "fp16", of which a part has no others: `model.fp16.safetensors`."""
    return next(filter(None, map(_variant_of, (folder, *folder.iterdir()))), None)


def _variant_of(part: Path) -> str | None:
    files = [*part.glob("*.safetensors")] or [*part.glob("*.bin")]
    kinds = {file.name.split(".")[1].partition("-")[0] for file in files}
    return min(kinds) if kinds and not kinds & {"safetensors", "bin"} else None


def _parameters(pipeline: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            yield from module.named_parameters(prefix=part)


def _check(folder: Path, index: Any) -> None:
    """Raise `ValueError` if a pipeline has classes from elsewhere, or code where diffusers looks for some.

    Before version 0.38 diffusers runs such code, and imports any module that the index names.
    """
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError("its model_index.json names no pipeline of diffusers")
    places = [folder / "None.py"]  # of a custom pipeline, where none is asked for
    for name, entry in index.items():
        source = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        if source is None:
            continue
        library = source in ("diffusers", "transformers") or hasattr(diffusers().pipelines, str(source))
        if not library and not str(source).startswith(OWN):
            raise ValueError(
                f"{name} is of {str(source)[:80]!r}: the parts of a pipeline are of diffusers or transformers"
            )
        places.append(folder / name / f"{source}.py")
    code = next((place for place in places if place.exists()), None)
    if code is not None:
        raise ValueError(f"it brings code of its own, {code}, which is not run")


def read_network(config: Path) -> NetworkDenoiser:
    """The denoiser of the folder of a network alone, such as `unet/`, given its `config.json`.

    Noise levels are those of the scheduler beside it: `scheduler_config.json` in the folder, or in a folder `scheduler`
    next to it. Without one, U-Nets of Stable Diffusion 1 and XL have the published levels, and `UNet2DModel` those of
    DDPM.

    Raises:
        ValueError: the folder is damaged, or of a network that is not read.
        ImportError: the extra is missing.
    """
    folder, library = config.parent, diffusers()
    try:
        options = json.loads(config.read_text(encoding="utf-8"))
        kind = choose("network of diffusers", options.get("_class_name"), FAMILIES)
        scheduler = _scheduler_beside(folder, options)
        network = getattr(library, options["_class_name"]).from_pretrained(
            folder, local_files_only=True, use_safetensors=not _holds_pickles(folder), variant=_variant(folder)
        )
        denoiser = from_network(network.float(), scheduler)
    except DAMAGES as error:
        raise ValueError(f"cannot read the network of diffusers in {folder}: {one_line(error)}") from None
    logger = logging.getLogger("diffdistill")
    logger.info("%s: %s alone, with the noise levels of %s", folder, kind.kind, type(scheduler).__name__)
    return denoiser


def _scheduler_beside(folder: Path, options: Mapping[str, Any]) -> Any:
    library = diffusers()
    places = (folder / SCHEDULER, folder.absolute().parent / "scheduler" / SCHEDULER)
    path = next((place for place in places if place.is_file()), None)
    if path is not None:
        stated = json.loads(path.read_text(encoding="utf-8"))
        made = getattr(library, str(stated.get("_class_name")), None)
        if not (isinstance(made, type) and issubclass(made, library.SchedulerMixin)):
            raise ValueError(f"{path} is of no scheduler of diffusers")
        return made.from_config(stated)
    if options["_class_name"] == "UNet2DModel":
        return library.DDPMScheduler()
    if options["_class_name"] == "UNet2DConditionModel" and options.get("cross_attention_dim") in STABLE_DIFFUSION:
        return library.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    raise ValueError(
        f"nothing says what it predicts at which noise levels: put the {SCHEDULER} of its pipeline into it"
    )


def read_folder(index: Path) -> NetworkDenoiser:
    """The denoiser of a diffusers folder, given its `model_index.json`, and a word in the log on what it is."""
    parts = load_pipeline(index.parent)
    taking = "" if parts.denoiser.w_range is None else f", guidance weight {list(parts.denoiser.w_range)} as an input"
    logging.getLogger("diffdistill").info("%s: %s%s", index.parent, type(parts.pipeline).__name__, taking)
    return parts.denoiser
