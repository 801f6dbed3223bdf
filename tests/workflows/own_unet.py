import math

import torch
from torch import nn

import diffdistill


class Block(nn.Module):
    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.emb, self.skip = nn.Linear(width, outputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, e):
        h = self.conv1(nn.functional.silu(self.norm1(x))) + self.emb(e)[:, :, None, None]
        return self.skip(x) + self.conv2(nn.functional.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(4, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).view(b, c, h * w)).chunk(3, dim=1)
        a = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(c), dim=-1)
        return x + self.out(v @ a.transpose(1, 2)).view(b, c, h, w)


@diffdistill.register_network("own_unet", null_label=10, w_into="time_mlp", bottleneck="mid2")
class UNet(nn.Module):
    def __init__(self, channels=1, width=16, num_labels=11):
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(num_labels, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down1, self.down2 = Block(width, width, width), Block(width, 2 * width, width)
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.mid1, self.attention, self.mid2 = (
            Block(2 * width, 2 * width, width),
            Attention(2 * width),
            Block(2 * width, 2 * width, width),
        )
        self.up2, self.up1 = Block(4 * width, width, width), Block(2 * width, width, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t, labels):
        steps = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        phase = t.float()[:, None] * steps
        e = self.time_mlp(torch.cat([phase.sin(), phase.cos()], dim=1)) + self.labels(labels)
        a = self.down1(self.first(x), e)
        b = self.down2(self.pool(a), e)
        h = self.mid2(self.attention(self.mid1(self.pool(b), e)), e)
        h = self.up2(torch.cat([self.grow(h), b], dim=1), e)
        return self.last(self.up1(torch.cat([self.grow(h), a], dim=1), e))
