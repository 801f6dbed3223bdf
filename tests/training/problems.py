"""Small objectives and data for the tests of the trainer."""

import torch
from torch import nn

from diffdistill.training import Loss, Objective, TrainerConfig
from diffdistill.training.randomness import rand, randn


class Fit(Objective):
    """A small network with dropout and a buffer, noise from the generator, and a frozen teacher."""

    def __init__(self, dropout=0.1):
        super().__init__()
        torch.manual_seed(1)
        self.trained = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 5))
        self.teacher = nn.Linear(5, 5).requires_grad_(False)

    def loss(self, batch, generator):
        x = batch["x"]
        noisy = x + randn(x.shape, generator) * rand(x.shape[:1], generator)[:, None]
        error = (self.trained(noisy) - self.teacher(x)).square().mean()
        return Loss(error, {"scale": noisy.std()})


class Rows:
    """37 vectors; without `tensors`, so that they are loaded item by item."""

    def __init__(self, length=37):
        self.x = torch.randn(length, 5, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "index": torch.tensor(index)}


class HeldRows(Rows):
    def tensors(self):
        return {"x": self.x, "index": torch.arange(len(self))}


def settings(**changes):
    values = {"updates": 23, "batch_size": 12, "log_every": 5, "checkpoint_every": 6, "device": "cpu", "warmup": 3}
    values["precision"] = "fp32"
    return TrainerConfig.from_dict({**values, "decay": "cosine", "ema_half_life": 40.0, "clip": 1.0, **changes})
