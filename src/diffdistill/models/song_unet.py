"""DDPM++ and NCSN++ (Song et al. 2021, Score-Based Generative Modeling through SDEs), as in EDM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

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
    fourier_embedding,
    linear,
    positional_embedding,
)


class SongUNet(AddedInputs):
    """The U-Net of DDPM++ (the defaults) and NCSN++.

    NCSN++ is `embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1]`.

    Args:
        img_resolution: height and width of the images.
        img_channels: channels of the images.
        out_channels: channels of the output, if not `img_channels`.
        label_dim: length of the one-hot class labels, 0 for none.
        augment_dim: length of the augmentation labels, 0 for none.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        s_channels: width of the embedding of the end of a step, of flow maps, 0 for none.
        model_channels: channels of the first level.
        channel_mult: channels of each level over `model_channels`; every level halves the resolution.
        channel_mult_emb: width of the embedding over `model_channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with self-attention.
        dropout: probability of dropping an activation.
        embedding_type: of the noise level.
        channel_mult_noise: width of the noise level's embedding over `model_channels`.
        encoder_type, decoder_type: "residual" and "skip" carry the image itself along the levels.
        resample_filter: low-pass filter of up- and downsampling.
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
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        for option, value, valid in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in valid:
                raise ValueError(f"{option} {value!r} is unknown: choose one of {', '.join(valid)}")
        self.label_dim = label_dim
        self.channel_mult, self.num_blocks = tuple(channel_mult), num_blocks
        self.model_channels, self.img_resolution = model_channels, img_resolution
        self.attn_resolutions = tuple(attn_resolutions)

        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init = Init("xavier_uniform")
        style = BlockStyle(
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=0.5**0.5,
            eps=1e-6,
            resample_filter=tuple(resample_filter),
            resample_proj=True,
            adaptive_scale=False,
            init=init,
            init_zero=replace(init, weight=1e-5),
            init_attn=replace(init, weight=0.2**0.5),
        )
        if embedding_type == "positional":
            self.map_noise = positional_embedding(noise_channels, endpoint=True, sin_first=True)
        else:
            self.map_noise = fourier_embedding(noise_channels)
        self.map_label = linear(label_dim, noise_channels, init) if label_dim else None
        self.map_augment = linear(augment_dim, noise_channels, init, bias=False) if augment_dim else None
        self.make_inputs(noise_channels, w_channels=w_channels, s_channels=s_channels)
        self.map_layer0 = linear(noise_channels, emb_channels, init)
        self.map_layer1 = linear(emb_channels, emb_channels, init)
        self.enc, skips = self._encoder(img_channels, style, encoder_type)
        self.dec = self._decoder(skips, img_channels if out_channels is None else out_channels, style, decoder_type)

    def _encoder(self, img_channels: int, style: BlockStyle, kind: str) -> tuple[nn.ModuleDict, list[int]]:
        enc = nn.ModuleDict()
        channels = self.model_channels
        image: int = img_channels
        skips = []
        how: dict[str, Any] = {"resample": "down", "resample_filter": style.resample_filter}
        for level, mult in enumerate(self.channel_mult):
            res = self.img_resolution >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = Conv2d(img_channels, channels, 3, style.init)
            else:
                enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, style, resample="down")
                if kind == "skip":
                    enc[f"{res}x{res}_aux_down"] = Conv2d(image, image, 0, **how)
                    enc[f"{res}x{res}_aux_skip"] = Conv2d(image, channels, 1, style.init)
                elif kind == "residual":
                    enc[f"{res}x{res}_aux_residual"] = Conv2d(image, channels, 3, style.init, filter_last=True, **how)
                    image = channels
            skips.append(channels)
            for i in range(self.num_blocks):
                before, channels = channels, self.model_channels * mult
                enc[f"{res}x{res}_block{i}"] = UNetBlock(
                    before, channels, style, attention=res in self.attn_resolutions
                )
                skips.append(channels)
        return enc, skips

    def _decoder(self, skips: list[int], out_channels: int, style: BlockStyle, kind: str) -> nn.ModuleDict:
        dec = nn.ModuleDict()
        channels = skips[-1]
        lowest = len(self.channel_mult) - 1
        for level in range(lowest, -1, -1):
            res = self.img_resolution >> level
            if level == lowest:
                dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, style, attention=True)
                dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, style)
            else:
                dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, style, resample="up")
            for i in range(self.num_blocks + 1):
                before, channels = channels + skips.pop(), self.model_channels * self.channel_mult[level]
                attention = i == self.num_blocks and res in self.attn_resolutions
                dec[f"{res}x{res}_block{i}"] = UNetBlock(before, channels, style, attention=attention)
            if kind == "skip" or level == 0:
                if kind == "skip" and level < lowest:
                    how: dict[str, Any] = {"resample": "up", "resample_filter": style.resample_filter}
                    dec[f"{res}x{res}_aux_up"] = Conv2d(out_channels, out_channels, 0, **how)
                dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, 3, style.init_zero)
        return dec

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
        """Evaluate the network.

        Args:
            x: scaled image, `[B, img_channels, H, W]`.
            noise_labels: `c_noise`, `[B]`.
            class_labels: one-hot, `[B, label_dim]`; None or zeros for no class.
            w: guidance weight, `[B]`; None for zeros.
            ratio: end of the step over its beginning, `[B]` in [0, 1], of flow maps; None for 1.
            augment_labels: `[B, augment_dim]`, or None for no augmentation.

        Returns:
            `[B, out_channels, H, W]`.
        """
        emb = self._embed(noise_labels, class_labels, w, ratio, augment_labels)
        return self._decode(*self._encode(x, emb), emb)

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
            if self.map_label is not None:
                labels = emb.new_zeros(len(emb), self.label_dim) if class_labels is None else class_labels.to(dtype)
                emb = emb + self.map_label(labels * self.label_dim**0.5)
            if self.map_augment is not None and augment_labels is not None:
                emb = emb + self.map_augment(augment_labels.to(dtype))
            emb = self.add_inputs(emb, w, ratio)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        image = x
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                image = block(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + block(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + block(image)) * 0.5**0.5
            else:
                x = block(x) if name.endswith("conv") else block(x, emb)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        image: Tensor | None = None
        normed = x
        for name, block in self.dec.items():
            if name.endswith("aux_up"):
                image = block(image)
            elif name.endswith("aux_norm"):
                normed = block(x)
            elif name.endswith("aux_conv"):
                update = block(F.silu(normed))
                image = update if image is None else image + update
            else:
                x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        assert image is not None
        return image
