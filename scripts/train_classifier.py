"""Train a small classifier whose features and answers measure generated images.

Example: diffdistill train-classifier subject=emoji out=runs/classifier
"""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from common.checks import check_file
from common.command import command
from common.typed import typed_command
from diffdistill.data import load_data
from diffdistill.metrics.classifier import save_classifier, shipped, train_classifier


@command("train_classifier")
def main(config: DictConfig) -> None:
    path = Path(config.out) / shipped(config.subject)
    check_file(path, ".safetensors")
    options = {name: config[name] for name in ("updates", "batch_size", "lr", "seed")}
    model = train_classifier(config.subject, **options)
    data = {split: load_data(config.subject, split=split, **model.task.data).tensors() for split in ("train", "test")}
    accuracy = {split: model.accuracy(**images) for split, images in data.items()}
    arguments = " ".join(f"{name}={value}" for name, value in {"subject": config.subject, **options}.items())
    provenance = {
        "command": f"{typed_command()} {arguments}",
        "data": f"{config.subject}, split=train",
        "accuracy_train": f"{accuracy['train']:.4f}",
        "accuracy_held_out": f"{accuracy['test']:.4f}",
        "torch": torch.__version__,
    }
    save_classifier(model, path, provenance)
    print(f"accuracy {accuracy['train']:.4f} on training images, {accuracy['test']:.4f} on held-out images: {path}")


if __name__ == "__main__":
    main()
