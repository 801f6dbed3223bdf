"""What learned solvers read of a pipeline's network, through a hook that is there during a run alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffdistill.solvers import FeatureTap


class Bottleneck:
    """The last output of a module while a scheduler listens.

    A copy of a scheduler reads the same network. One that is copied together with the network reads the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._tap: FeatureTap | None = None

    @property
    def output(self) -> Any:
        """The last output, or None."""
        return None if self._tap is None else self._tap()

    def listen(self) -> None:
        """Hook into the module, unless that is done."""
        if self._tap is None:
            self._tap = FeatureTap(self.module)

    def forget(self) -> None:
        """Take the hook off the module."""
        if self._tap is not None:
            self._tap.remove()
        self._tap = None

    def __del__(self) -> None:
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Bottleneck:
        copied = memo.get(id(self.module))
        return self if copied is None else Bottleneck(copied)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_tap": None}
