"""Networks as users write them: no base class of ours, their own conventions."""

import math

import torch
from torch import nn


def sinusoidal(t, width):
    phases = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class Block(nn.Module):
    def __init__(self, conv, inputs, outputs, width):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.emb = nn.Linear(width, outputs)
        self.skip = conv(inputs, outputs, 1)

    def forward(self, x, e):
        h = self.conv1(nn.functional.silu(x))
        h = h + self.emb(e).view(len(e), -1, *(1,) * (h.ndim - 2))
        return self.skip(x) + self.conv2(nn.functional.silu(h))


class Net(nn.Module):
    """A network of convolutions on signals, images or video, or of layers on points, with a `view` in its middle."""

    def __init__(self, channels=2, rank=2, width=8, num_labels=0, time_table=0):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.width = width
        self.table = nn.Embedding(time_table, width) if time_table else None
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(num_labels, width) if num_labels else None
        self.down = Block(conv, channels, width, width)
        self.mid = Block(conv, width, width, width)
        self.up = Block(conv, 2 * width, channels, width)

    def forward(self, x, t, y=None):
        e = sinusoidal(t, self.width) if self.table is None else self.table(t)
        e = self.time_mlp(e)
        if self.labels is not None and y is not None:
            e = e + self.labels(y)
        h = self.down(x, e)
        m = self.mid(h, e)
        assert m.view(m.shape[0], -1).shape[1] > 1
        return self.up(torch.cat([h, m], dim=1), e)


class Points(nn.Module):
    """A network on points `[D]`."""

    def __init__(self, dim=2, width=16, num_labels=0):
        super().__init__()
        self.width = width
        self.time_mlp = nn.Linear(width, width)
        self.labels = nn.Embedding(num_labels, width) if num_labels else None
        self.inside, self.mid, self.outside = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, x, t, y=None):
        e = self.time_mlp(sinusoidal(t, self.width))
        if self.labels is not None and y is not None:
            e = e + self.labels(y)
        return self.outside(self.mid((self.inside(x) + e).tanh()).tanh())
