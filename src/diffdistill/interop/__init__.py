"""Foreign checkpoints, read as data: nothing that a file carries is executed.

`diffdistill.load_denoiser` opens what `read_foreign` knows, and the folders of diffusers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffdistill.denoiser import Denoiser
from diffdistill.interop.containers.checkpoints import open_checkpoint, read_arrays
from diffdistill.interop.containers.records import ForeignFileError, UnsafePickleError
from diffdistill.interop.formats.adm import read_adm
from diffdistill.interop.formats.building import ForeignModel
from diffdistill.interop.formats.edm import find_module, read_edm
from diffdistill.interop.formats.flux import holds_flux, read_flux
from diffdistill.interop.formats.ldm import holds_latent_diffusion, read_ldm
from diffdistill.interop.formats.unets import Hints
from diffdistill.models.loading import read_safetensors
from diffdistill.models.storage import MODEL
from diffdistill.training.weights import is_checkpoint, read_checkpoint

__all__ = [
    "ForeignFileError",
    "ForeignModel",
    "Hints",
    "UnsafePickleError",
    "open_checkpoint",
    "read_arrays",
    "read_foreign",
]


def read_foreign(path: str | os.PathLike[str], hints: Hints | None = None) -> ForeignModel:
    """Read a checkpoint of another project: EDM, AMED, ADM, consistency models or latent diffusion.

    What it is follows from its content, not from its name. Nothing of it is executed, and what is allocated is bounded
    by the size of the file.

    Args:
        path: of the file.
        hints: what ADM-like files do not say and their published models do not settle.

    Returns:
        The denoiser, or the predictor or classifier, with a description.

    Raises:
        UnsafePickleError: the file names something that is not on the allow-list, such as `os.system`.
        ForeignFileError: it is truncated, damaged or of another kind; a `ValueError`, as is the above.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        if find_module(checkpoint.root) is not None:
            found = read_edm(checkpoint)
        elif holds_flux(checkpoint):
            found = read_flux(checkpoint)
        elif holds_latent_diffusion(checkpoint):
            found = read_ldm(checkpoint, hints)
        elif isinstance(checkpoint.root, dict) and "input_blocks.0.0.weight" in checkpoint.root:
            found = read_adm(checkpoint, path, hints)
        else:
            root = checkpoint.root
            if isinstance(root, dict) and root.keys() >= {"trained", "optimizer", "journal"}:
                raise ForeignFileError("it is a checkpoint of a run of diffdistill: give the folder of that run")
            held = ", ".join(str(key)[:40] for key in list(root)[:5]) if isinstance(root, dict) else type(root).__name__
            raise ForeignFileError(
                "it is no model of diffdistill, EDM, AMED, ADM, consistency models, latent or Stable Diffusion, FLUX: "
                f"it holds {held or 'nothing'}"
            )
    config = getattr(found.denoiser, "config", None)
    if config is not None:
        config["provenance"] = {**config["provenance"], "file": path.name, "found": found.description}
    return found


def read_denoiser(path: Path) -> Denoiser:
    """Read a foreign denoiser, or that in a checkpoint of a run, and say in the log what it is.

    Raises:
        ForeignFileError: as `read_foreign`, or the file holds a classifier or a predictor.
    """
    if is_checkpoint(path):
        return read_checkpoint(path)
    found = read_foreign(path)
    if found.denoiser is None:
        raise ForeignFileError(
            f"{path} is no denoiser but an {found.description}: use diffdistill.interop.read_foreign"
        )
    logging.getLogger("diffdistill").info("%s: %s", path, found.description)
    return found.denoiser


def read_either(path: Path) -> Denoiser:
    """Read a safetensors file: one of ours by its metadata, or a foreign one.

    Raises:
        ValueError: as `read_safetensors` and `read_denoiser`.
    """
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        if MODEL.key not in (file.metadata() or {}):
            return read_denoiser(path)
    return read_safetensors(path)
