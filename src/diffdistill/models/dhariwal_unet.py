"""ADM (Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis), as in EDM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.models.layers import (
    AddedInputs,
    BlockStyle,
    Conv2d,
    GroupNorm,
    Init,
    UNetBlock,
    linear,
    positional_embedding,
)


class DhariwalUNet(AddedInputs):
    """The U-Net of ADM; the defaults are those of ImageNet 64x64.

    Args:
        img_resolution: height and width of the images.
        img_channels: channels of the images.
        out_channels: channels of the output, if not `img_channels`; twice as many where the variance is predicted.
        label_dim: length of the one-hot class labels, 0 for none.
        augment_dim: length of the augmentation labels, 0 for none.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        s_channels: width of the embedding of the end of a step, of flow maps, 0 for none.
        model_channels: base number of channels.
        channel_mult: channels of each level over `model_channels`; every level halves the resolution.
        channel_mult_emb: width of the embedding over `model_channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with self-attention.
        dropout: probability of dropping an activation.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        out_channels: int | None = None,
        label_dim: int = 0,
        augment_dim: int = 0,
        w_channels: int = 0,
        s_channels: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=3**-0.5, bias=3**-0.5)
        zero = Init("kaiming_uniform", weight=0)
        style = BlockStyle(emb_channels=emb_channels, dropout=dropout, init=init, init_zero=zero, init_attn=init)

        self.map_noise = positional_embedding(model_channels, endpoint=False, sin_first=False)
        self.map_augment = linear(augment_dim, model_channels, zero, bias=False) if augment_dim else None
        self.make_inputs(model_channels, w_channels=w_channels, s_channels=s_channels)
        self.map_layer0 = linear(model_channels, emb_channels, init)
        self.map_layer1 = linear(emb_channels, emb_channels, init)
        one_hot = replace(Init("kaiming_normal"), weight=label_dim**0.5)
        self.map_label = linear(label_dim, emb_channels, one_hot, bias=False) if label_dim else None

        # Encoder.
        self.enc = nn.ModuleDict()
        channels = model_channels * channel_mult[0]
        skips = []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(img_channels, channels, 3, init)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, style, resample="down")
            skips.append(channels)
            for i in range(num_blocks):
                before, channels = channels, model_channels * mult
                block = UNetBlock(before, channels, style, attention=res in attn_resolutions)
                self.enc[f"{res}x{res}_block{i}"] = block
                skips.append(channels)

        # Decoder.
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, style, attention=True)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, style)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, style, resample="up")
            for i in range(num_blocks + 1):
                before, channels = channels + skips.pop(), model_channels * mult
                block = UNetBlock(before, channels, style, attention=res in attn_resolutions)
                self.dec[f"{res}x{res}_block{i}"] = block
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, img_channels if out_channels is None else out_channels, 3, zero)

    @property
    def bottleneck(self) -> nn.Module:
        """The last block of the encoder, at the lowest resolution."""
        return list(self.enc.values())[-1]

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        w: Tensor | None = None,
        ratio: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network; the arguments are those of `SongUNet.forward`."""
        emb = self._embed(noise_labels, class_labels, w, ratio, augment_labels)
        skips: list[Tensor] = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def _embed(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        w: Tensor | None,
        ratio: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        dtype = self.map_layer0.weight.dtype
        # Out of autocast: the embedding costs next to nothing, and its digits tell noise levels apart.
        with torch.autocast(noise_labels.device.type, enabled=False):
            emb = self.map_noise(noise_labels).to(dtype)
            if self.map_augment is not None and augment_labels is not None:
                emb = emb + self.map_augment(augment_labels.to(dtype))
            emb = self.add_inputs(emb, w, ratio)
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None and class_labels is not None:
                emb = emb + self.map_label(class_labels.to(dtype))
            return F.silu(emb)
