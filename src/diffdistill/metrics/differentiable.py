"""Feature extractors to train with: differentiable in the image, so that nothing is rounded to bytes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.metrics.networks import DINOv2, optional


def to_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1] on the scale of bytes, RGB `[B, 3, H, W]`, not rounded."""
    x = x.float() * 127.5 + 127.5
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


class SmoothDINOv2(DINOv2):
    """`DINOv2` without the rounding to bytes."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.token(to_levels(x)), None


class LPIPS:
    """Features whose squared distance is LPIPS (Zhang et al. 2018), of a trunk of ImageNet classification.

    Activations of each layer, normalised over channels and weighted by the roots of the learned weights, over the root
    of the number of places.

    Args:
        net: the trunk, which torchvision fetches on first use.
        size: images are resized to this height and width (bilinear); None leaves them as they are.
        pretrained: False for random weights.

    Raises:
        ImportError: lpips is not installed.
    """

    def __init__(
        self, *, net: Literal["vgg", "alex", "squeeze"] = "vgg", size: int | None = 224, pretrained: bool = True
    ) -> None:
        package = optional("lpips", wanted_by="the distance lpips")
        options: dict[str, Any] = {"pretrained": pretrained, "pnet_rand": not pretrained, "verbose": False}
        self.model = package.LPIPS(net=net, **options).requires_grad_(False)
        self.size = size

    def __call__(self, x: Tensor) -> Tensor:
        """Features `[B, D]` of images `[B, C, H, W]` in [-1, 1], with 1 channel or 3."""
        x = x.float().expand(-1, 3, -1, -1) if x.shape[1] == 1 else x.float()
        if self.size is not None:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        model = self.model.to(x.device)
        layers = []
        for activation, head in zip(model.net(model.scaling_layer(x)), model.lins, strict=True):
            unit = activation / (activation.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weights = head.model[-1].weight / unit[0, 0].numel()
            layers.append((weights.sqrt() * unit).flatten(1))
        return torch.cat(layers, dim=1)
