"""A network of any make, in the form that denoisers call."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import NULL_LABEL, check_labels
from diffdistill.models.layers import SinusoidalEmbedding, guidance_embedding, ratio_embedding
from diffdistill.models.own.registration import Call
from diffdistill.solvers.features import FeatureTap

PROBES = 3
"""Samples of the trial call."""


class OwnNetwork(nn.Module):
    """A network as it is, called as the user says.

    Args:
        net: the network; it is not copied.
        num_classes: number of class labels, 0 for a network that takes none.
        call: `call(net, x, t, cond) -> output`; None for `net(x, t)` or `net(x, t, labels)`.
        null_label: the label that the network takes for "no class", or None where it knows none.
        time_scale: multiplies the time.
        integer_time: round the time, for networks that look it up in a table. Then no gradient flows through it.
        w_into: name of the module whose output takes the guidance weight.
        bottleneck: name of the module whose output learned solvers read.
        w_channels: width of the embedding of a guidance weight, 0 for none.
        s_channels: width of the embedding of the end of a step, of flow maps, which enters there too; 0 for none.
        w_features: channels of the output of `w_into`, needed with `w_channels` and `s_channels`.

    Raises:
        ValueError: a name that no module has, or a null label that is no label.
    """

    keeps_layout = True
    """The network may hold `view`s, which need the layout that it was written for."""
    w_parameters = ("w_input.map.weight",)
    s_parameter = "s_input.map.weight"

    def __init__(
        self,
        net: nn.Module,
        *,
        num_classes: int = 0,
        call: Call | None = None,
        null_label: int | None = None,
        time_scale: float = 1.0,
        integer_time: bool = False,
        w_into: str | None = None,
        bottleneck: str | None = None,
        w_channels: int = 0,
        s_channels: int = 0,
        w_features: int | None = None,
    ) -> None:
        super().__init__()
        _check_null(net, null_label, num_classes)
        self.net = net
        self.label_dim, self.null_label = num_classes, null_label
        self.call: Call = call or _call
        self.time_scale, self.integer_time = time_scale, integer_time
        self.w_into, self.bottleneck_name = w_into, bottleneck
        for option, name in (("w_into", w_into), ("bottleneck", bottleneck)):
            if name is not None:
                module_named(net, name, option)
        self.w_channels = self.s_channels = 0
        self.w_input: AddedInput | None = None
        self.s_input: AddedInput | None = None
        if w_channels or s_channels:
            if w_into is None or w_features is None:
                raise ValueError("w_channels and s_channels need w_into and w_features too")
            self._add_inputs(w_channels, s_channels, w_features)

    @property
    def conditional(self) -> bool:
        return self.label_dim > 0

    @property
    def bottleneck(self) -> nn.Module | None:
        return None if self.bottleneck_name is None else self.net.get_submodule(self.bottleneck_name)

    def take_inputs(self, data_shape: tuple[int, ...], *, w_channels: int = 0, s_channels: int = 0) -> int:
        """Add a guidance weight, or the end of a step, to the output of `w_into`; returns `w_features`.

        At first they do nothing.

        Raises:
            ValueError: no such module was named.
        """
        if self.w_into is None:
            raise ValueError(
                "where a guidance weight, or the end of a step, enters this network is not known: name a module, such "
                'as the one that embeds the time, by wrap(..., w_into="NAME")'
            )
        features = features_of(self.try_call(data_shape)["w_into"], 1 + len(data_shape))
        self._add_inputs(w_channels, s_channels, features)
        return features

    def _add_inputs(self, w_channels: int, s_channels: int, features: int) -> None:
        if w_channels:
            self.w_channels, self.w_input = w_channels, self._input(guidance_embedding(w_channels), features)
        if s_channels:
            self.s_channels, self.s_input = s_channels, self._input(ratio_embedding(s_channels), features)

    def _input(self, embedding: SinusoidalEmbedding, features: int) -> AddedInput:
        assert self.w_into is not None
        added, reference = AddedInput(embedding, features), next(self.net.parameters())
        self.net.get_submodule(self.w_into).register_forward_hook(added.enter)
        return added.to(device=reference.device, dtype=reference.dtype)

    def bare_network(self) -> nn.Module:
        """A copy of the network without what was added to it."""
        net = copy.deepcopy(self.net)
        for module in net.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(getattr(hook, "__self__", None), AddedInput):
                    del module._forward_hooks[key]
        return net

    def null_condition(self, cond: Any) -> Any:
        """Labels of no class."""
        if self.null_label is None and self.label_dim:
            raise ValueError(
                "this network knows no label for no class: say which one it is, by wrap(..., null_label=N)"
            )
        return None if cond is None else torch.full_like(cond, NULL_LABEL)

    def check_condition(self, cond: Any, batch: int) -> None:
        """As `Denoiser.check_condition`; no class needs a null label."""
        check_labels(cond, batch, self.label_dim)
        if self.label_dim and self.null_label is None and (cond is None or bool((cond == NULL_LABEL).any())):
            self.null_condition(cond)

    def forward(
        self, x: Tensor, noise_labels: Tensor, cond: Any, w: Tensor | None = None, ratio: Tensor | None = None
    ) -> Tensor:
        """Call the network.

        Args:
            x: `[B, ...]`.
            noise_labels: the time, `[B]`.
            cond: class labels, long `[B]`, -1 for none; None for no class at all.
            w: guidance weight `[B]`; None stands for 0.
            ratio: the end of a step over its beginning, `[B]`; None stands for 1.

        Raises:
            ValueError: the output has another shape than `x`.
        """
        time = noise_labels * self.time_scale
        if self.integer_time:
            time = time.round().long()
        if self.w_input is not None:
            self.w_input.bind(torch.zeros(len(x), device=x.device) if w is None else w, x.ndim)
        if self.s_input is not None:
            self.s_input.bind(torch.ones(len(x), device=x.device) if ratio is None else ratio, x.ndim)
        output = self.call(self.net, x.contiguous(), time, self._labels(cond, x))
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the network answers {got} to samples {list(x.shape)}: {_hint(output, x)}")
        return output

    def _labels(self, cond: Any, x: Tensor) -> Tensor | None:
        if not self.label_dim:
            return None
        if self.null_label is None:
            return cond
        if cond is None:
            return torch.full((len(x),), self.null_label, device=x.device)
        return torch.where(cond == NULL_LABEL, self.null_label, cond)

    def try_call(self, data_shape: tuple[int, ...], time: float = 0.5) -> dict[str, Tensor]:
        """Call the network once, to find out at once what would fail later.

        Returns:
            The outputs of the modules named by `w_into` and `bottleneck`, by those words.

        Raises:
            ValueError: it cannot be called so, answers in another shape, or does not call these modules.
        """
        reference = next(self.net.parameters())
        x = torch.zeros(PROBES, *data_shape, device=reference.device, dtype=reference.dtype)
        times = torch.full((PROBES,), time, device=x.device)
        labels = torch.arange(PROBES, device=x.device) % self.label_dim if self.label_dim else None
        if labels is not None and self.null_label is not None:
            labels[0] = NULL_LABEL
        names = {"w_into": self.w_into, "bottleneck": self.bottleneck_name}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(_evaluating(self))
            taps = {
                option: stack.enter_context(FeatureTap(self.net.get_submodule(name)))
                for option, name in names.items()
                if name is not None
            }
            try:
                self(x, times, labels)
            except Exception as error:
                raise ValueError(self._fault(error)) from error
            outputs = {option: tap() for option, tap in taps.items()}
        for option, output in outputs.items():
            if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != PROBES:
                got = list(output.shape) if isinstance(output, Tensor) else "nothing" if output is None else "no tensor"
                raise ValueError(
                    f"{option}={names[option]!r}: this module gives {got} for {PROBES} samples, not one [B, C, ...]"
                )
        return {option: output for option, output in outputs.items() if output is not None}

    def _fault(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and reason.startswith("the network answers"):
            return reason
        said = f"{type(error).__name__}: {reason}"
        if self.null_label is not None and isinstance(error, IndexError):
            said += f"; is null_label={self.null_label} in its table?"
        elif not self.integer_time:
            said += '; if it looks the time up in a table: time="integer"'
        arguments = "x, t, labels" if self.label_dim else "x, t"
        how = (
            "by your call"
            if self.call is not _call
            else f"as net({arguments}): say how by call=lambda net, x, t, cond: ..."
        )
        return f"the network cannot be called {how} ({said})"


class AddedInput(nn.Module):
    """Adds a linear map of the embedding of a number per sample to the output of a module, through a hook on it.

    The hook is a method of this module, so that copies of a network that holds both have their own.

    Args:
        embed: the embedding.
        features: channels of the output.
    """

    def __init__(self, embed: SinusoidalEmbedding, features: int) -> None:
        super().__init__()
        self.embed = embed
        self.map = nn.Linear(2 * len(embed.freqs), features, bias=False)
        nn.init.zeros_(self.map.weight)
        self.values: Tensor | None = None
        self.rank = 0

    def bind(self, values: Tensor, rank: int) -> None:
        """Take the numbers `[B]` of the call to come, whose samples `[B, ...]` are of that rank."""
        self.values, self.rank = values, rank

    def enter(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The hook. Channels are dimension 1 of outputs of the samples' rank, else the last dimension."""
        assert self.values is not None
        term = self.map(self.embed(self.values).to(self.map.weight.dtype)).to(output.dtype)
        ones = (1,) * (output.ndim - 2)
        shape = (len(term), -1, *ones) if output.ndim == self.rank else (len(term), *ones, term.shape[1])
        return output + term.reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": None}  # which belongs to a call, and may not be copied


def features_of(output: Tensor, rank: int) -> int:
    """Channels of an output, as `AddedInput.enter` finds them."""
    return output.shape[1] if output.ndim == rank else output.shape[-1]


def module_named(net: nn.Module, name: str, option: str) -> nn.Module:
    """A module by its dotted name.

    Raises:
        ValueError: there is none; lists those of the most similar names.
    """
    names = [known for known, _ in net.named_modules() if known]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        raise ValueError(f"{option}={name!r} names no module of the network: near are {', '.join(near) or 'none'}")
    return net.get_submodule(name)


def _call(net: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return net(x, t) if cond is None else net(x, t, cond)


def _check_null(net: nn.Module, null_label: Any, num_classes: int) -> None:
    if null_label is None:
        return
    if not num_classes:
        raise ValueError(f"null_label={null_label!r}: a network of num_classes=0 takes no labels")
    if isinstance(null_label, bool) or not isinstance(null_label, int) or not 0 <= null_label <= num_classes:
        raise ValueError(f"null_label must be an integer from 0 to num_classes={num_classes}, but is {null_label!r}")
    # Looked at before the network is called: on a GPU an index outside a table ends the program.
    rows = {module.num_embeddings for module in net.modules() if isinstance(module, nn.Embedding)}
    if null_label == num_classes and num_classes in rows and num_classes + 1 not in rows:
        raise ValueError(
            f"null_label={null_label} is outside the network's table of {num_classes} labels, 0 to {num_classes - 1}"
        )


def _hint(output: Any, x: Tensor) -> str:
    if isinstance(output, Tensor) and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
        return "leave out what it says of the variance, by call=lambda net, x, t, cond: net(x, t)[:, :C]"
    if not isinstance(output, Tensor):
        return "say what of its answer counts, by call=lambda net, x, t, cond: net(x, t).sample"
    return "both must be of one shape: see data_shape, and call=lambda net, x, t, cond: ..."


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and then each module's mode as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
