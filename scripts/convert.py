"""Turn a checkpoint of another project into a file of ours, and say what it is. Nothing of it is executed.

diffdistill convert edm-cifar10-32x32-cond-vp.pkl models/edm-cifar10.safetensors
diffdistill convert source=model.pt dest=models/model.safetensors hints.family=consistency
diffdistill convert v1-5-pruned.ckpt models/stable-diffusion tokenizer=clip-tokenizer

Stable Diffusion becomes a file of its U-Net alone, or, given a tokenizer, a folder of diffusers with all its parts.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from diffdistill.interop import Hints, read_foreign
from diffdistill.interop.formats.stable_folder import write_pipeline
from diffdistill.models import save_denoiser


def convert(config: DictConfig) -> None:
    """Read the source, say what it is, and write it."""
    settings = plain(config)
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
