"""Small classifiers of digits and emoji: their features for the Fréchet distance, their answers for class accuracy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.data import load_data
from diffdistill.files.atomic import replacing

Subject = Literal["digits", "emoji"]
_BATCH = 512


@dataclass(frozen=True)
class Task:
    """What a classifier is for, and its size.

    Attributes:
        name: of the classifier, for messages.
        shape: `(C, H, W)` of the images.
        num_classes: length of the logits.
        channels: of the convolutions; the image is halved after each but the first.
        num_features: width of the last hidden layer.
        background: what surrounds an image that is moved.
        data: options of the data set that has the images.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    channels: tuple[int, ...]
    num_features: int
    background: float
    data: Mapping[str, Any] = field(default_factory=dict)


TASKS: dict[Subject, Task] = {
    "digits": Task("a digit classifier", (1, 8, 8), 10, (32, 48, 64), 64, -1.0),
    "emoji": Task("an emoji classifier", (3, 16, 16), 9, (32, 48, 64, 96), 96, 0.0, {"resolution": 16}),
}


def shipped(subject: Subject) -> str:
    """The name of the file that holds the classifier of `subject` which comes with the package."""
    return f"{subject}-classifier.safetensors"


class Classifier(nn.Module):
    """A convolutional network on images in [-1, 1]: 59 thousand parameters for digits, 136 thousand for emoji.

    Args:
        subject: one of `TASKS`.

    Raises:
        ValueError: an unknown subject.
    """

    def __init__(self, subject: Subject = "digits") -> None:
        super().__init__()
        if subject not in TASKS:
            raise ValueError(f"there is no classifier of {subject!r}: choose one of {', '.join(get_args(Subject))}")
        self.subject: Subject = subject
        self.task = task = TASKS[subject]
        layers, before, size = [], task.shape[0], task.shape[1]
        for level, channels in enumerate(task.channels):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.SiLU()]
            before = channels
            if level > 0:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(before * size**2, task.num_features), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(task.num_features, task.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Activations `[B, num_features]` of the last hidden layer, differentiable in `x`.

        Raises:
            ValueError: images of another shape than those of the task.
        """
        if x.shape[1:] != self.task.shape:
            wanted = ", ".join(map(str, ("B", *self.task.shape)))
            raise ValueError(f"{self.task.name} takes images [{wanted}], not {list(x.shape)}")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]`."""
        return self.head(self.features(x))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The most likely class, long `[B]`, in parts of 512 images."""
        return torch.cat([self(part).argmax(dim=1) for part in x.split(_BATCH)])

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of images `x` whose most likely class is `y`: long `[B]`."""
        if y.shape != x.shape[:1]:
            raise ValueError(f"expected one label per image, shape [{len(x)}], not {list(y.shape)}")
        return float((self.predict(x) == y.to(x.device)).double().mean())


def train_classifier(
    subject: Subject = "digits", *, updates: int = 1000, batch_size: int = 128, lr: float = 3e-3, seed: int = 0
) -> Classifier:
    """Train on the train split of `subject`, with small random shifts, turns, scales and noise.

    AdamW, one cosine descent of the learning rate, label smoothing 0.05. What is returned, frozen and in eval mode, is
    the average of the weights over about 100 updates.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # dropout and initial weights draw from the global stream
        torch.manual_seed(seed)
        return _train(Classifier(subject), updates, batch_size, lr, generator)


def _train(model: Classifier, updates: int, batch_size: int, lr: float, generator: torch.Generator) -> Classifier:
    x, y = load_data(model.subject, split="train", **model.task.data).tensors().values()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        chosen = torch.randint(len(x), (batch_size,), generator=generator)
        logits = model(_jitter(x[chosen], model.task.background, generator))
        loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    trained = average.module
    assert isinstance(trained, Classifier)
    return trained.eval().requires_grad_(False)


def _jitter(x: Tensor, background: float, generator: torch.Generator) -> Tensor:
    # Shifts of up to 7.5 % of the image, turns of up to 0.15 rad and 8 % of scale keep a digit the same digit.
    angle, scale, right, down = (2 * torch.rand(4, len(x), generator=generator) - 1).unbind()
    angle, scale = 0.15 * angle, 1 + 0.08 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, 0.15 * right, sin, cos, 0.15 * down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x - background, grid, padding_mode="zeros", align_corners=False) + background
    return moved + 0.05 * torch.randn(x.shape, generator=generator)


def save_classifier(model: Classifier, path: str | os.PathLike[str], provenance: dict[str, str]) -> None:
    """Write the weights with `provenance` (text by name) as the metadata of one safetensors file."""
    with replacing(path) as temporary:
        save_file(
            model.state_dict(),
            temporary,
            metadata={"format": "diffdistill-classifier", "subject": model.subject, **provenance},
        )


def load_classifier(path: str | os.PathLike[str] | None = None, *, subject: Subject = "digits") -> Classifier:
    """The shipped classifier of `subject`, or one that `save_classifier` wrote, frozen and in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown subject, or weights of another architecture.
    """
    model = Classifier(subject)
    if path is None:
        with as_file(files("diffdistill").joinpath("assets").joinpath(shipped(subject))) as asset:
            return load_classifier(asset, subject=subject)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {str(path)!r}")
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != expected:
        raise ValueError(f"{str(path)!r} does not hold the weights of {model.task.name}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def classifier_provenance(subject: Subject = "digits") -> dict[str, str]:
    """How the shipped classifier was made: command, versions and held-out accuracy."""
    with (
        as_file(files("diffdistill").joinpath("assets").joinpath(shipped(subject))) as path,
        safe_open(path, framework="pt") as file,
    ):
        return dict(file.metadata())
