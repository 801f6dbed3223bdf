"""Turn a checkpoint of another project into a file of ours, and say what it is. Nothing of it is executed.

diffdistill convert edm-cifar10-32x32-cond-vp.pkl models/edm-cifar10.safetensors
diffdistill convert source=model.pt dest=models/model.safetensors hints.family=consistency
diffdistill convert v1-5-pruned.ckpt models/stable-diffusion tokenizer=clip-tokenizer
diffdistill convert models/ddpm-classes models/ddpm.safetensors hints.null_class=10

Stable Diffusion becomes a file of its U-Net alone, or, given a tokenizer, a folder of diffusers with all its parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from diffdistill.interop import Hints, read_foreign
from diffdistill.interop.formats.stable_folder import write_pipeline
from diffdistill.models import save_denoiser

OF_FOLDERS = ("null_class", "guidance_convention")
"""The hints on diffusers folders."""


def convert_folder(settings: dict[str, Any], hints: dict[str, Any]) -> None:
    """Write the denoiser of a diffusers folder, with what the folder does not say."""
    from diffdistill.interop.diffusers import load_pipeline

    given = [f"hints.{name}" for name, value in settings["hints"].items() if value is not None]
    given += ["tokenizer"] * (settings["tokenizer"] is not None)
    if given:
        raise ValueError(f"{given[0]} has no effect on a diffusers folder: leave it out")
    parts = load_pipeline(settings["source"], **hints)
    print(f"{settings['source']}: {type(parts.pipeline).__name__}")
    save_denoiser(parts.denoiser, settings["dest"])
    print(f"the model is {settings['dest']}")


def convert(config: DictConfig) -> None:
    """Read the source, say what it is, and write it."""
    settings = plain(config)
    of_folders = {name: settings["hints"].pop(name) for name in OF_FOLDERS}
    if Path(settings["source"]).is_dir():
        convert_folder(settings, of_folders)
        return
    given = next((name for name, value in of_folders.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"hints.{given} has no effect on a file: it is for diffusers folders")
    found = read_foreign(settings["source"], Hints(**settings["hints"]))
    print(f"{settings['source']}: {found.description}")
    if found.denoiser is None:
        raise ValueError(f"a {found.kind} is not converted: read it with diffdistill.interop.read_foreign")
    if settings["tokenizer"] is not None:
        print(f"the pipeline is {write_pipeline(found, settings['tokenizer'], settings['dest'])}")
        return
    if found.kind == "stable-diffusion":
        print("autoencoder and text encoder are left out: give tokenizer=FOLDER for a diffusers folder with all parts")
    save_denoiser(found.denoiser, settings["dest"])
    print(f"the model is {settings['dest']}")


def named(arguments: list[str]) -> list[str]:
    """SOURCE and DEST, given by their place, as Hydra overrides."""
    names = iter(("source", "dest"))

    def override(argument: str) -> str:
        name = None if argument.startswith("-") or "=" in argument else next(names, None)
        quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
        return argument if name is None else f"{name}='{quoted}'"

    return [override(argument) for argument in arguments]


@command("convert", by_place=named)
def main(config: DictConfig) -> None:
    convert(config)


if __name__ == "__main__":
    main()
