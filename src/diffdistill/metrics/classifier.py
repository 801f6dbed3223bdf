"""A small classifier of 8x8 digits: its features for the Fréchet distance, its answers for class accuracy."""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffdistill.data import Digits
from diffdistill.files.atomic import replacing

SHIPPED = "digits-classifier.safetensors"
_BATCH = 512


class DigitClassifier(nn.Module):
    """A convolutional network of 59 thousand parameters on images `[B, 1, 8, 8]` in [-1, 1]."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, self.num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def features(self, x: Tensor) -> Tensor:
        """Activations `[B, 64]` of the last hidden layer.

        Raises:
            ValueError: images of another shape than `[B, 1, 8, 8]`.
        """
        if x.shape[1:] != (1, 8, 8):
            raise ValueError(f"the digit classifier takes images [B, 1, 8, 8], not {list(x.shape)}")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]`."""
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


def train_classifier(*, updates: int = 1000, batch_size: int = 128, lr: float = 3e-3, seed: int = 0) -> DigitClassifier:
    """Train on the train split of the digits, with small random shifts, turns, scales and noise.

    AdamW, one cosine descent of the learning rate, label smoothing 0.05. What is returned, frozen and in eval mode, is
    the average of the weights over about 100 updates.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # dropout and initial weights draw from the global stream
        torch.manual_seed(seed)
        return _train(updates, batch_size, lr, generator)


def _train(updates: int, batch_size: int, lr: float, generator: torch.Generator) -> DigitClassifier:
    x, y = Digits(split="train").tensors().values()
    model = DigitClassifier()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        chosen = torch.randint(len(x), (batch_size,), generator=generator)
        logits = model(_jitter(x[chosen], generator))
        loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    trained = average.module
    assert isinstance(trained, DigitClassifier)
    return trained.eval().requires_grad_(False)


def _jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    # Shifts of up to 0.6 pixel, turns of up to 0.15 rad and 8 % of scale keep a digit the same digit.
    angle, scale, right, down = (2 * torch.rand(4, len(x), generator=generator) - 1).unbind()
    angle, scale = 0.15 * angle, 1 + 0.08 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, 0.15 * right, sin, cos, 0.15 * down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, padding_mode="zeros", align_corners=False) - 1
    return moved + 0.05 * torch.randn(x.shape, generator=generator)


def save_classifier(model: DigitClassifier, path: str | os.PathLike[str], provenance: dict[str, str]) -> None:
    """Write the weights with `provenance` (text by name) as the metadata of one safetensors file."""
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary, metadata={"format": "diffdistill-digit-classifier", **provenance})


def load_classifier(path: str | os.PathLike[str] | None = None) -> DigitClassifier:
    """The shipped classifier, or one that `save_classifier` wrote, frozen and in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another architecture.
    """
    if path is None:
        with as_file(files("diffdistill").joinpath("assets").joinpath(SHIPPED)) as shipped:
            return load_classifier(shipped)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {str(path)!r}")
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = DigitClassifier()
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != expected:
        raise ValueError(f"{str(path)!r} does not hold the weights of a digit classifier")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def classifier_provenance() -> dict[str, str]:
    """How the shipped classifier was made: command, versions and held-out accuracy."""
    with (
        as_file(files("diffdistill").joinpath("assets").joinpath(SHIPPED)) as path,
        safe_open(path, framework="pt") as file,
    ):
        return dict(file.metadata())
