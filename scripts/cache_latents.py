"""Encode a folder of images and captions to latents and text embeddings, once, for both stages of distillation.

    python scripts/cache_latents.py model=models/stable-diffusion images=data/laion512 out=data/laion512-latents

Running the same command again continues an interrupted run.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common import command, plain
from diffdistill.devices import device_of
from diffdistill.interop.diffusers import load_pipeline
from diffdistill.interop.diffusers.caching import cache_latents


@command("cache_latents")
def main(config: DictConfig) -> None:
    settings = plain(config)
    parts = load_pipeline(settings["model"])
    parts.pipeline.to(device_of(settings["device"]))
    options = {name: settings[name] for name in ("batch_size", "shard_size", "dtype", "seed")}
    print(f"the latents are {cache_latents(parts, settings['images'], settings['out'], **options)}")


if __name__ == "__main__":
    main()
