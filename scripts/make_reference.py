"""Compute reference statistics of real images: what samples are compared with.

    diffdistill make-reference data=cifar10 features=inception out=references/cifar10.npz
    diffdistill make-reference data=images data.root=DIR features=dinov2 keep_features=true out=reference.npz

The file holds `mu` and `sigma` as EDM's does, the extractor's name and the hash of its weights; with
`keep_features=true` also all features, which kernel distance, precision, recall, density and coverage need.
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.checks import check_file
from common.command import command
from common.configs import plain
from diffdistill.data import load_data
from diffdistill.devices import device_of
from diffdistill.distributed import rank
from diffdistill.metrics.collect import Keep, collect
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.reference import reference_of, save_reference
from diffdistill.metrics.sources import StoredImages


@command("make_reference")
def main(config: DictConfig) -> None:
    settings = plain(config)
    check_file(settings["out"], ".npz")
    data = StoredImages(load_data(**settings["data"]), limit=settings["num_samples"])
    device, features = device_of(settings["device"]), make_features(settings["features"])
    keep = Keep(features=settings["keep_features"])
    collected = collect(data, features, keep=keep, batch_size=settings["batch_size"], device=device)
    if rank() == 0:
        save_reference(reference_of(collected, features), settings["out"])
        print(f"{len(collected)} images, {features.name} (weights {features.weights}): {settings['out']}")


if __name__ == "__main__":
    main()
