"""Train the small digit classifier whose features and answers measure generated digits.

Example: diffdistill train-classifier out=runs/classifier
"""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from common.checks import check_file
from common.command import command
from common.typed import typed_command
from diffdistill.data import load_data
from diffdistill.metrics.classifier import SHIPPED, save_classifier, train_classifier


@command("train_classifier")
def main(config: DictConfig) -> None:
    path = Path(config.out) / SHIPPED
    check_file(path, ".safetensors")
    options = {name: config[name] for name in ("updates", "batch_size", "lr", "seed")}
    model = train_classifier(**options)
    accuracy = {split: model.accuracy(**load_data("digits", split=split).tensors()) for split in ("train", "test")}
    arguments = " ".join(f"{name}={value}" for name, value in options.items())
    provenance = {
        "command": f"{typed_command()} {arguments}",
        "data": "digits, split=train",
        "accuracy_train": f"{accuracy['train']:.4f}",
        "accuracy_held_out": f"{accuracy['test']:.4f}",
        "torch": torch.__version__,
    }
    save_classifier(model, path, provenance)
    print(f"accuracy {accuracy['train']:.4f} on training digits, {accuracy['test']:.4f} on held-out digits: {path}")


if __name__ == "__main__":
    main()
