"""Networks under a name, which model files record and configs choose."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from diffdistill.registry import enter

Call = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""How a network is called: `call(net, x, t, cond)`, cond being class labels `[B]` or None."""
Time = Literal["index", "integer", "unit"]
Make = TypeVar("Make", bound=Callable[..., Any])

UNREGISTERED = "unregistered"
"""The name in the files of networks that have none."""
_MADE_AS = "_made_as"
"""Where a network keeps the name it was built under, and its options; copies of it have them too."""


@dataclass(frozen=True)
class Registration:
    """A network under a name, and how it is called where nothing else is said.

    Attributes:
        make: the class or function that builds it.
        call: how it is called, or None for `net(x, t)` and `net(x, t, labels)`.
        defaults: of the options of `wrap` of the same names.
    """

    make: Callable[..., nn.Module]
    call: Call | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


REGISTERED: dict[str, Registration] = {}


def register_network(
    name: str,
    *,
    call: Call | None = None,
    time: Time | None = None,
    null_label: int | None = None,
    w_into: str | None = None,
    bottleneck: str | None = None,
) -> Callable[[Make], Make]:
    """A decorator that gives a network class, or a function that builds a network, a name.

    Model files then record the name and the options that the network was built with, so that `load_denoiser` builds it
    again; configs choose it by `network.name`. What else is said here is how it is called: the defaults of `wrap`.

    Args:
        name: a word of letters, digits, "_" and "-".
        call: as of `wrap`, like those below.
        time: "index", "integer" or "unit".
        null_label: the label of no class.
        w_into: the module that takes the guidance weight.
        bottleneck: the module that learned solvers read.

    Raises:
        ValueError: the name is taken, or is no word; or the network has options that files cannot hold.
    """
    given = {"time": time, "null_label": null_label, "w_into": w_into, "bottleneck": bottleneck}
    defaults = {key: value for key, value in given.items() if value is not None}

    def decorate(make: Make) -> Make:
        from diffdistill.models.building import NETWORKS

        if name == UNREGISTERED:
            raise ValueError(f"the name {name!r} stands for networks without one: choose another")
        _check_options(name, make)
        made = _remembering(make, name)
        enter("network", name, NETWORKS, made)
        REGISTERED[name] = Registration(made, call, defaults)
        return made

    return decorate


def made_as(network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name that a network was built under, and its options; None where it has no name."""
    return getattr(network, _MADE_AS, None)


def is_plain(value: Any) -> bool:
    """Whether a file can hold a value: numbers, texts, lists and dicts of such."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_options(name: str, make: Callable[..., Any]) -> None:
    parameters = inspect.signature(make).parameters
    if "name" in parameters:
        raise ValueError(f"the network {name!r} has an option 'name', which stands for {name!r} itself: rename it")
    unnamed = next((p for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)), None)
    if unnamed is not None:
        raise ValueError(f"the network {name!r} takes {unnamed} without a name, which files cannot hold: name it")


def _remembering(make: Any, name: str) -> Any:
    """A class, or a function, whose networks know the options that they were built with."""
    if isinstance(make, type):
        init: Any = make.__init__

        @functools.wraps(init)
        def remembering(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is make:
                _remember(self, name, inspect.signature(init).bind(self, *args, **kwargs), skip=1)

        make.__init__ = remembering  # pyright: ignore[reportAttributeAccessIssue]
        return make

    @functools.wraps(make)
    def function(*args: Any, **kwargs: Any) -> Any:
        network = make(*args, **kwargs)
        if not isinstance(network, nn.Module):
            raise TypeError(f"the network {name!r} is made by a function that returned a {type(network).__name__}")
        _remember(network, name, inspect.signature(make).bind(*args, **kwargs), skip=0)
        return network

    return function


def _remember(network: nn.Module, name: str, bound: inspect.BoundArguments, *, skip: int) -> None:
    """Note the options given, and the defaults of the others where a file can hold them: these may change one day."""
    given, options = set(bound.arguments), {}
    bound.apply_defaults()
    for option, value in list(bound.arguments.items())[skip:]:
        if bound.signature.parameters[option].kind is inspect.Parameter.VAR_KEYWORD:
            options.update(value)
        elif option in given or is_plain(value):
            options[option] = value
    setattr(network, _MADE_AS, (name, options))
