"""The networks of diffusers, called as all networks here are: `network(x, noise_labels, cond, w)`.

Each class stands for a family and knows its conditions. They are registered in `models.files.NETWORKS`, so that a
model of diffusers is saved, loaded, given a guidance input and trained by the same functions as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.denoiser import NULL_LABEL
from diffdistill.interop.diffusers.conventions import GUIDANCE_CONVENTIONS, guidance_scale_embedding
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.registry import choose


class DiffusersNetwork(nn.Module):
    """A network of diffusers. Subclasses define `evaluate`, and say what they need as a condition.

    Args:
        module: the network, or its options, from which it is built with fresh weights.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        guidance_convention: what of w the network embeds, one of `GUIDANCE_CONVENTIONS`.
        null: shapes of the parts of a condition that carry no information, by name. They are buffers of the network,
            zero until they are set.

    Attributes:
        module: the network itself.
        required: the names of the parts of a condition that the network needs.
    """

    kind: ClassVar[str]
    conditional: bool = True
    default_w_channels: ClassVar[int] = 256
    w_parameters: tuple[str, ...] = ()

    def __init__(
        self,
        module: nn.Module | Mapping[str, Any],
        *,
        w_channels: int = 0,
        guidance_convention: str = "w",
        null: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.embedded = choose("guidance convention", guidance_convention, GUIDANCE_CONVENTIONS)
        self.w_channels = w_channels
        built: Any = module
        if not isinstance(module, nn.Module):
            built = self.build({key: value for key, value in module.items() if not key.startswith("_")})
        self.module: Any = built.eval()
        self.options: Any = self.module.config
        self.null_names = tuple(null or ())
        for name, shape in (null or {}).items():
            self.register_buffer(f"null_{name}", torch.zeros(*shape))
        self.required: tuple[str, ...] = ()

    def build(self, options: dict[str, Any]) -> Any:
        """The network with fresh weights."""
        return getattr(diffusers(), self.kind).from_config(options)

    @property
    def bottleneck(self) -> nn.Module | None:
        """The middle block."""
        return getattr(self.module, "mid_block", None)

    @property
    def label_dim(self) -> int:
        """Class labels that it takes."""
        return 0

    def set_null(self, null: Mapping[str, Tensor]) -> None:
        """Keep the parts of the condition that carries no information, without a batch dimension."""
        for name in self.null_names:
            getattr(self, f"null_{name}").copy_(null[name])

    def null_condition(self, cond: Any) -> Any:
        """The condition in the structure of `cond` that carries no information; what is not text stays as it is.

        Raises:
            ValueError: the network does not know the embedding of an empty prompt.
        """
        if cond is None:
            return None
        known = {name: getattr(self, f"null_{name}") for name in self.null_names}
        if not known:
            raise ValueError(
                "this network does not know the embedding of an empty prompt: make it with from_pipeline, or with null="
            )
        return {
            name: known[name].to(value).expand_as(value) if name in known else value for name, value in cond.items()
        }

    def check_condition(self, cond: Any, batch: int) -> None:
        """Raise `ValueError` unless `cond` is None or a dict of all parts that the network needs, `[batch, ...]`."""
        if cond is None:
            return
        names = ", ".join(self.required)
        if not isinstance(cond, dict):
            raise ValueError(f"the condition is a dict of tensors ({names}), not a {type(cond).__name__}")
        for name in cond:
            if name not in self.required:
                raise ValueError(f"the condition has no part {name!r}: it is made of {names}")
        for name in self.required:
            if name not in cond:
                raise ValueError(f"the condition misses {name!r}: it is made of {names}")
            if len(cond[name]) != batch:
                raise ValueError(f"{name} of the condition holds {len(cond[name])} samples, but the batch {batch}")

    def forward(self, x: Tensor, noise_labels: Tensor, cond: Any = None, w: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: scaled latents or images, `[B, C, H, W]`.
            noise_labels: the continuous timestep, `[B]`.
            cond: the condition; None stands for the one that carries no information.
            w: guidance weight of Meng et al., `[B]`; None for 0.
        """
        if self.required:
            cond = self._filled(cond, len(x))
            cond = {name: value.to(x) if value.is_floating_point() else value for name, value in cond.items()}
        embedded = None
        if self.w_channels:
            embedded = self.embedded(torch.zeros_like(noise_labels) if w is None else w.to(noise_labels.dtype))
        elif w is not None:
            raise ValueError("this network takes no guidance weight: guide it with ClassifierFreeGuidance")
        return self.evaluate(x, noise_labels, cond, embedded)

    def _filled(self, cond: Any, batch: int) -> dict[str, Tensor]:
        if cond is not None:
            return cond
        missing = [name for name in self.required if name not in self.null_names]
        if missing:
            raise ValueError(f"this network needs a condition: a dict of {', '.join(self.required)}")
        parts = {name: getattr(self, f"null_{name}") for name in self.required}
        return {name: part.expand(batch, *part.shape) for name, part in parts.items()}

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        """Call the network; `w` is what it embeds."""
        raise NotImplementedError


class _Labelled(DiffusersNetwork):
    """A network of class labels `[B]`, with or without a row of its table that stands for no class."""

    null_class: int | None

    @property
    def conditional(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label_dim > 0

    def null_condition(self, cond: Any) -> Any:
        if cond is not None and self.null_class is None:
            raise ValueError(
                "this network was trained with a class for every image, so that there is nothing to guide away from: "
                "give null_class if a row of its table stands for no class"
            )
        return None if cond is None else torch.full_like(cond, NULL_LABEL)

    def check_condition(self, cond: Any, batch: int) -> None:
        low = 0 if self.null_class is None else NULL_LABEL
        if cond is None and (self.null_class is not None or not self.label_dim):
            return
        if not self.label_dim:
            raise ValueError("this denoiser takes no class labels: pass cond=None")
        if not isinstance(cond, Tensor) or cond.is_floating_point() or cond.shape != (batch,):
            raise ValueError(f"class labels are an integer tensor of shape [{batch}]")
        wrong = cond[(cond < low) | (cond >= self.label_dim)]
        if wrong.numel():
            raise ValueError(f"class label {int(wrong[0])} is unknown: labels are {low} to {self.label_dim - 1}")

    def _rows(self, cond: Any, x: Tensor) -> Tensor | None:
        """The rows of the table for the labels, with -1 and None for no class."""
        if not self.label_dim:
            return None
        if self.null_class is None:
            if cond is None:
                raise ValueError("this network needs a class label for every image: pass cond")
            return cond
        if cond is None:
            return torch.full((len(x),), self.null_class, device=x.device)
        return torch.where(cond == NULL_LABEL, self.null_class, cond)


class UNet2D(_Labelled):
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

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        return self.module(x, noise_labels, class_labels=self._rows(cond, x), return_dict=False)[0]


class DiT(_Labelled):
    """`DiTTransformer2DModel` (Peebles and Xie 2023): class-conditional, with a row for no class after the classes."""

    kind = "DiTTransformer2DModel"

    @property
    def label_dim(self) -> int:
        return self.options.num_embeds_ada_norm

    @property
    def null_class(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label_dim

    def evaluate(self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None) -> Tensor:
        rows = self._rows(cond, x)
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


class SD3Transformer(DiffusersNetwork):
    """`SD3Transformer2DModel` (Esser et al. 2024), conditioned on text and pooled text."""

    kind = "SD3Transformer2DModel"

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        self.required = ("encoder_hidden_states", "pooled_projections")

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
    guidance_convention: str = "w",
    null: Mapping[str, Sequence[int]] | None = None,
    null_class: int | None = None,
    img_channels: int = 0,
    img_resolution: int = 0,
    label_dim: int = 0,
) -> DiffusersNetwork:
    """A network of diffusers with fresh weights.

    Args:
        kind: the name of its class, one of `FAMILIES`.
        options: its config.
        w_channels: as in `DiffusersNetwork`.
        guidance_convention: as in `DiffusersNetwork`.
        null: as in `DiffusersNetwork`.
        null_class: as in `UNet2D`.
        img_channels: what `build_denoiser` fills in; the options say it too.
        img_resolution: the same.
        label_dim: the same.
    """
    family = choose("network of diffusers", kind, FAMILIES)
    common: dict[str, Any] = {"w_channels": w_channels, "guidance_convention": guidance_convention, "null": null}
    if family is UNet2D:
        common["null_class"] = null_class
    return family(options, **common)
