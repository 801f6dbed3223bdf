"""Classifier guidance: a classifier of noisy images, and a denoiser guided by it (Dhariwal and Nichol 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.models.adm_unet import (
    ADMShape,
    ADMStyle,
    AttentionOrder,
    Resample,
    encoder,
    middle,
    normalization,
    self_attention,
)
from diffdistill.models.guidance import _Guided
from diffdistill.models.layers import positional_embedding
from diffdistill.models.preconditioning import Preconditioning


class AttentionPool(nn.Module):
    """Attention of the mean of an image's positions to all of them."""

    def __init__(self, size: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) * channels**-0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, channels, size, size]` to `[B, out_channels]`."""
        flat = x.flatten(2)
        tokens = torch.cat([flat.mean(2, keepdim=True), flat], dim=2) + self.positional_embedding
        return self.c_proj(self_attention(self.qkv_proj(tokens), self.num_heads, "qkv_first"))[:, :, 0]


class EncoderUNet(nn.Module):
    """The lower half of `OpenAIUNet` with an attention pool: ADM's classifier, by its published parameter names.

    Args:
        img_resolution, img_channels: of the images.
        num_classes: length of the result.
        model_channels, channel_mult, num_blocks, attn_resolutions, adaptive_scale, resample, head_channels,
        attention_order: as in `OpenAIUNet`; the defaults are those of ImageNet 256x256.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int = 3,
        num_classes: int = 1000,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        num_blocks: int = 2,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        adaptive_scale: bool = True,
        resample: Resample = "residual",
        head_channels: int = 64,
        attention_order: AttentionOrder = "heads_first",
    ) -> None:
        super().__init__()
        style = ADMStyle(
            emb_channels=4 * model_channels,
            adaptive_scale=adaptive_scale,
            resample=resample,
            head_channels=head_channels,
            attention_order=attention_order,
        )
        shape = ADMShape.of(
            img_resolution=img_resolution,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        self.map_noise = positional_embedding(model_channels, endpoint=False, sin_first=False)
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, style.emb_channels), nn.SiLU(), nn.Linear(style.emb_channels, style.emb_channels)
        )
        self.input_blocks, skips = encoder(img_channels, shape, style)
        channels = skips[-1]
        self.middle_block = middle(channels, style)
        size = img_resolution >> (len(channel_mult) - 1)
        pool = AttentionPool(size, channels, style.heads(channels), num_classes)
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), pool)

    def forward(self, x: Tensor, noise_labels: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of a scaled image `[B, img_channels, H, W]` with `c_noise: [B]`."""
        emb = self.time_embed(self.map_noise(noise_labels).to(x.dtype))
        for stage in self.input_blocks:
            x = stage(x, emb)
        return self.out(self.middle_block(x, emb))


class NoisyClassifier(nn.Module):
    """A classifier of noisy images, `(x, sigma) -> logits`, from a network that takes `(c_in x, c_noise)`.

    Args:
        network: called as `network(x, noise_labels)`.
        preconditioning: of which `c_in` and `c_noise` are used; that of the denoiser that it was trained beside.
        num_classes: length of the logits.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning, *, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning
        self.num_classes = num_classes

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of `x: [B, C, H, W]` with noise of standard deviation `sigma: [B]`."""
        dtype = next(self.network.parameters()).dtype
        sigma = sigma.to(torch.float64)
        scaled = (per_sample(self.preconditioning.c_in(sigma), x) * x).to(dtype)
        noise_labels = self.preconditioning.c_noise(sigma).to(torch.promote_types(dtype, torch.float32))
        return self.network(scaled, noise_labels)


class ClassifierGuidance(_Guided):
    """`D(x, sigma, y) + scale sigma^2 grad_x log p(y | x, sigma)` (Dhariwal and Nichol 2021, Algorithm 2).

    The classifier's evaluation and gradient are not counted in `cost`. Samples without a label are not guided.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`; labels reach it only if it has classes itself.
        classifier: any callable `(x, sigma) -> logits [B, K]`, differentiable in x, such as a `NoisyClassifier`.
        scale: of the gradient, a float or `[B]`.
    """

    def __init__(
        self, denoiser: Callable[..., Tensor], classifier: Callable[..., Tensor], scale: float | Tensor = 1.0
    ) -> None:
        super().__init__(denoiser, scale)
        self.classifier = classifier
        self.denoiser_takes_labels = self.denoiser.num_classes > 0
        self.num_classes = getattr(classifier, "num_classes", self.num_classes)
        self.cost = self.denoiser.cost

    def check_condition(self, cond: Any, batch: int) -> None:
        Denoiser.check_condition(self, cond, batch)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]`, guided to the labels `cond: [B]`."""
        denoised = self.denoiser(x, sigma, cond if self.denoiser_takes_labels else None)
        if cond is None:
            return denoised
        scale = self.weights(x) if isinstance(self.w, Tensor) else torch.full_like(sigma, self.w)
        weight = scale.to(torch.float64) * sigma.to(torch.float64) ** 2
        return denoised + per_sample(weight, x) * self._gradient(x, sigma, cond)

    def _gradient(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Of `log p(cond | x, sigma)` in x."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if differentiable and x.requires_grad else x.detach().requires_grad_()
            log_p = F.log_softmax(self.classifier(x, sigma).float(), dim=1)
            chosen = log_p.gather(1, cond.clamp(min=0)[:, None])[:, 0]
            total = torch.where(cond >= 0, chosen, 0.0).sum()
            return torch.autograd.grad(total, x, create_graph=differentiable)[0]
