"""What the networks of diffusers share: conditions, and a guidance weight as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.denoiser import NULL_LABEL
from diffdistill.interop.diffusers.adapters import inject
from diffdistill.interop.diffusers.conventions import GUIDANCE_CONVENTIONS, guidance_scale_embedding
from diffdistill.interop.diffusers.extra import diffusers
from diffdistill.models.layers import ratio_embedding
from diffdistill.models.transformer import zeroed
from diffdistill.registry import choose


class DiffusersNetwork(nn.Module):
    """A network of diffusers. Subclasses define `evaluate`, and say what they need as a condition.

    Args:
        module: the network, or its options, from which it is built with fresh weights.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        s_channels: width of the embedding of the end of a step, of flow maps, 0 for none. No stock pipeline gives it.
        guidance_convention: what of w the network embeds, one of `GUIDANCE_CONVENTIONS`.
        null: shapes of the parts of a condition that carry no information, by name. They are buffers of the network,
            zero until they are set.
        lora: options of `Adapters`, for a network with adapters, or None.

    Attributes:
        module: the network itself.
        required: the names of the parts of a condition that the network needs.
    """

    kind: ClassVar[str]
    conditional: bool = True
    default_w_channels: ClassVar[int] = 256
    w_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        module: nn.Module | Mapping[str, Any],
        *,
        w_channels: int = 0,
        s_channels: int = 0,
        guidance_convention: str = "w",
        null: Mapping[str, Sequence[int]] | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embedded = choose("guidance convention", guidance_convention, GUIDANCE_CONVENTIONS)
        self.w_channels, self.s_channels = w_channels, s_channels
        built: Any = module
        if not isinstance(module, nn.Module):
            built = self.build({key: value for key, value in module.items() if not key.startswith("_")})
        self.module: Any = built.eval()
        self.options: Any = self.module.config
        self.null_names = tuple(null or ())
        for name, shape in (null or {}).items():
            self.register_buffer(f"null_{name}", torch.zeros(*shape))
        self.required: tuple[str, ...] = ()
        self.lora = None if lora is None else inject(self.module, lora)
        self._added: Tensor | None = None
        self.map_s: nn.Linear | None = None
        if s_channels:
            self.embed_s = ratio_embedding(s_channels)
            self.map_s = zeroed(nn.Linear(s_channels, self.embedding_width, bias=False))
            self.add_at_places()
        self.unfreeze()

    def unfreeze(self) -> None:
        """Let all parameters be trained; where there are adapters, those and what takes w."""
        for name, parameter in self.named_parameters():
            added = name in self.w_parameters or name == "map_s.weight"
            parameter.requires_grad_(self.lora is None or "lora_" in name or added)

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

    @property
    def places(self) -> list[nn.Module]:
        """The modules that embed the time."""
        raise NotImplementedError

    @property
    def embedding_width(self) -> int:
        """Channels of the embedded time."""
        raise NotImplementedError

    def add_at_places(self) -> None:
        """Let `places` add what `added` says."""
        for place in self.places:
            if not place._forward_hooks:
                place.register_forward_hook(self._add)

    def _add(self, place: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded if self._added is None else embedded + self._added.to(embedded.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # What is added is of the last evaluation, and carries its graph: copies begin without.
        return {**self.__dict__, "_added": None}

    def added(self, w: Tensor | None, ratio: Tensor | None, like: Tensor) -> Tensor | None:
        """What the next evaluation adds to the embedded time; kept, since gradient checkpointing evaluates again."""
        if self.map_s is None:
            return None
        ratio = like.new_ones(len(like)) if ratio is None else ratio
        return self.map_s(self.embed_s(ratio).to(self.map_s.weight.dtype))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        cond: Any = None,
        w: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: scaled latents or images, `[B, C, H, W]`.
            noise_labels: the continuous timestep, `[B]`.
            cond: the condition; None stands for the one that carries no information.
            w: guidance weight of Meng et al., `[B]`; None for 0.
            ratio: end of the step over its beginning, `[B]` in [0, 1], of flow maps; None for 1.
        """
        if self.required:
            cond = self._filled(cond, len(x))
            cond = {name: value.to(x) if value.is_floating_point() else value for name, value in cond.items()}
        embedded = None
        if self.w_channels:
            embedded = self.embedded(torch.zeros_like(noise_labels) if w is None else w.to(noise_labels.dtype))
        elif w is not None:
            raise ValueError("this network takes no guidance weight: guide it with ClassifierFreeGuidance")
        if ratio is not None and self.map_s is None:
            raise ValueError("this network takes no end of a step: build it with s_channels > 0, or pass ratio=None")
        self._added = self.added(embedded, ratio, x)
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


class AddedWeight(DiffusersNetwork):
    """A network of diffusers that has no input for w: what embeds w is added to what embeds the time, at `places`.

    No stock pipeline gives such a student its w.
    """

    w_parameters = ("map_w.weight",)

    def __init__(self, module: Any, **common: Any) -> None:
        super().__init__(module, **common)
        self.map_w: nn.Linear | None = None
        if self.w_channels:
            self.map_w = zeroed(nn.Linear(self.w_channels, self.embedding_width, bias=False))
            self.add_at_places()
            self.unfreeze()

    def added(self, w: Tensor | None, ratio: Tensor | None, like: Tensor) -> Tensor | None:
        term = super().added(w, ratio, like)
        if self.map_w is None or w is None:
            return term
        embedded = self.map_w(guidance_scale_embedding(w, self.w_channels).to(like.dtype))
        return embedded if term is None else embedded + term


class Labelled(AddedWeight):
    """A network of class labels `[B]`, with or without a row of its table that stands for no class."""

    null_class: int | None

    @property
    def conditional(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label_dim > 0

    def null_condition(self, cond: Any) -> Any:
        if cond is not None and self.null_class is None:
            raise ValueError(
                "this network was trained with a class for every image, so that there is nothing to guide away from: "
                "if a row of its table stands for no class, say so by null_class, or diffdistill convert FOLDER FILE "
                "hints.null_class=ROW"
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

    def rows(self, cond: Any, x: Tensor) -> Tensor | None:
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
