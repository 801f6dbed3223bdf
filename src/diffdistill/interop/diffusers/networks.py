"""The networks of diffusers, called as all networks here are: `network(x, noise_labels, cond, w)`.

Each class stands for a family and knows its conditions. They are registered in `models.building.NETWORKS`, so that a
model of diffusers is saved, loaded, given a guidance input and trained by the same functions as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.interop.diffusers.base import AddedWeight, DiffusersNetwork, Labelled
from diffdistill.interop.diffusers.conventions import guidance_scale_embedding
from diffdistill.registry import choose


class UNet2D(Labelled):
    """`UNet2DModel`: images or latents without text.

    Args:
        module, null: as in `DiffusersNetwork`.
        null_class: the row of the table of classes that stands for no class, or None if there is none.
    """

    kind = "UNet2DModel"

    def __init__(self, module: Any, *, null_class: int | None = None, **common: Any) -> None:
        super().__init__(module, **common)
        self.null_class = null_class

    @property
    def label_dim(self) -> int:
        rows = self.options.num_class_embeds or 0
        return rows - (self.null_class is not None) if rows else 0

    @property
    def places(self) -> list[nn.Module]:
        return [self.module.time_embedding]

    @property
    def embedding_width(self) -> int:
        return self.module.time_embedding.linear_2.out_features

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        return self.module(x, noise_labels, class_labels=self.rows(cond, x), return_dict=False)[0]


class DiT(Labelled):
    """`DiTTransformer2DModel` (Peebles and Xie 2023): class-conditional, with a row for no class after the classes."""

    kind = "DiTTransformer2DModel"

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        for place in self.places:
            embedder: Any = place.get_submodule("class_embedder")
            embedder.dropout_prob = 0.0  # it would drop labels in training, where the condition says if there is one

    @property
    def label_dim(self) -> int:
        return self.options.num_embeds_ada_norm

    @property
    def null_class(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label_dim

    @property
    def places(self) -> list[nn.Module]:
        return [block.norm1.emb for block in self.module.transformer_blocks]

    @property
    def embedding_width(self) -> int:
        return self.options.num_attention_heads * self.options.attention_head_dim

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        rows = self.rows(cond, x)
        return self.module(x, timestep=noise_labels, class_labels=rows, return_dict=False)[0]


class UNet2DCondition(DiffusersNetwork):
    """`UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, and their inpainting models.

    The condition is a dict of `encoder_hidden_states` `[B, L, D]`; SDXL adds `text_embeds` `[B, P]` and `time_ids`
    `[B, 6]`; a network with further input channels (a mask, a masked image) adds them as `channels` `[B, C', H, W]`.
    """

    kind = "UNet2DConditionModel"
    w_parameters = ("module.time_embedding.cond_proj.weight",)

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        options = self.options
        self.further_channels = options.in_channels - options.out_channels
        if options.addition_embed_type not in (None, "text_time") or options.class_embed_type is not None:
            raise ValueError(
                f"a UNet with addition_embed_type={options.addition_embed_type!r} and class_embed_type="
                f"{options.class_embed_type!r} is not read: those of Stable Diffusion (None) and SDXL (text_time) are"
            )
        self.required = (
            "encoder_hidden_states",
            *(("text_embeds", "time_ids") if options.addition_embed_type == "text_time" else ()),
            *(("channels",) if self.further_channels else ()),
        )

    def build(self, options: dict[str, Any]) -> Any:
        options["time_cond_proj_dim"] = self.w_channels or None
        module = super().build(options)
        if self.w_channels:
            nn.init.zeros_(module.time_embedding.cond_proj.weight)  # so that a fresh student ignores w
        return module

    @property
    def places(self) -> list[nn.Module]:
        return [self.module.time_embedding]

    @property
    def embedding_width(self) -> int:
        return self.module.time_embedding.linear_2.out_features

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        if self.further_channels:
            x = torch.cat([x, cond["channels"]], dim=1)
        added = None if "text_embeds" not in cond else {name: cond[name] for name in ("text_embeds", "time_ids")}
        embedding = None if w is None else guidance_scale_embedding(w, self.w_channels).to(x.dtype)
        return self.module(
            x,
            noise_labels,
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep_cond=embedding,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class SD3Transformer(AddedWeight):
    """`SD3Transformer2DModel` (Esser et al. 2024), conditioned on text and pooled text."""

    kind = "SD3Transformer2DModel"

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        self.required = ("encoder_hidden_states", "pooled_projections")

    @property
    def places(self) -> list[nn.Module]:
        return [self.module.time_text_embed]

    @property
    def embedding_width(self) -> int:
        return self.options.num_attention_heads * self.options.attention_head_dim

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        return self.module(x, timestep=noise_labels, **cond, return_dict=False)[0]


class FluxTransformer(DiffusersNetwork):
    """`FluxTransformer2DModel`, conditioned on text, pooled text and, where it was distilled, the guidance scale.

    Latents `[B, C, H, W]` are packed into `[B, H W / 4, 4 C]` for the network and unpacked after it.
    """

    kind = "FluxTransformer2DModel"
    w_parameters = tuple(
        f"module.time_text_embed.guidance_embedder.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    )

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        channels, made = self.options.in_channels, self.options.out_channels
        if made not in (None, channels):
            raise ValueError(
                f"a FluxTransformer2DModel with {channels} input and {made} output channels is not read: it takes an "
                "image beside the latents, as those for filling and control do"
            )
        self.required = ("encoder_hidden_states", "pooled_projections")

    def build(self, options: dict[str, Any]) -> Any:
        options["guidance_embeds"] = bool(self.w_channels)
        module = super().build(options)
        if self.w_channels:
            # The last layer of the embedding of w, so that a fresh student ignores w.
            last = module.time_text_embed.guidance_embedder.linear_2
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return module

    @property
    def places(self) -> list[nn.Module]:
        return [self.module.time_text_embed]

    @property
    def embedding_width(self) -> int:
        return self.options.num_attention_heads * self.options.attention_head_dim

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        places = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(height, device=x.device, dtype=x.dtype)[:, None]
        places[..., 2] = torch.arange(width, device=x.device, dtype=x.dtype)
        text = torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype)
        packed = x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)
        answer = self.module(
            packed.flatten(3, 5).flatten(1, 2),
            timestep=noise_labels,
            img_ids=places.flatten(0, 1),
            txt_ids=text,
            guidance=w,
            **cond,
            return_dict=False,
        )[0]
        answer = answer.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))
        return answer.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


FAMILIES: dict[str, type[DiffusersNetwork]] = {
    family.kind: family for family in (UNet2D, UNet2DCondition, DiT, SD3Transformer, FluxTransformer)
}
"""The networks of diffusers that are read, by the names of their classes."""


def diffusers_network(
    *,
    kind: str,
    options: Mapping[str, Any],
    w_channels: int = 0,
    s_channels: int = 0,
    guidance_convention: str = "w",
    null: Mapping[str, Sequence[int]] | None = None,
    null_class: int | None = None,
    lora: Mapping[str, Any] | None = None,
    img_channels: int = 0,
    img_resolution: int = 0,
    label_dim: int = 0,
) -> DiffusersNetwork:
    """A network of diffusers with fresh weights.

    Args:
        kind: the name of its class, one of `FAMILIES`.
        options: its config.
        w_channels: as in `DiffusersNetwork`.
        s_channels: as in `DiffusersNetwork`.
        guidance_convention: as in `DiffusersNetwork`.
        null: as in `DiffusersNetwork`.
        null_class: as in `UNet2D`.
        lora: as in `DiffusersNetwork`.
        img_channels: what `build_denoiser` fills in; the options say it too.
        img_resolution: the same.
        label_dim: the same.
    """
    family = choose("network of diffusers", kind, FAMILIES)
    common: dict[str, Any] = {
        "w_channels": w_channels,
        "s_channels": s_channels,
        "guidance_convention": guidance_convention,
        "null": null,
    }
    common["lora"] = lora
    if family is UNet2D:
        common["null_class"] = null_class
    return family(options, **common)
