"""What learned solvers read of a network besides its answer: the output of its bottleneck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffdistill.denoiser import Denoiser
    from diffdistill.solvers.base import Solver


class FeatureTap:
    """Keeps the last output of a module, through one forward hook that stays until `remove`.

    It works on any module, such as `denoiser.bottleneck` or the `mid_block` of a diffusers UNet, and can be used as a
    context manager. Calling it returns the output.
    """

    def __init__(self, module: nn.Module) -> None:
        self.output: Tensor | None = None
        self._handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.output = output

    def __call__(self) -> Tensor | None:
        return self.output

    def remove(self) -> None:
        """Take the hook off the module and forget the output."""
        self._handle.remove()
        self.output = None

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class NoTap:
    """The tap of a solver that reads no features."""

    def __call__(self) -> None:
        return None

    def __enter__(self) -> NoTap:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def feature_tap(denoiser: Denoiser, solver: Solver) -> FeatureTap | NoTap:
    """The tap that `solver` needs on `denoiser`; use it in a `with` statement around the run.

    Raises:
        ValueError: the solver reads features, and the denoiser declares no bottleneck.
    """
    if solver.features == "unused":
        return NoTap()
    if denoiser.bottleneck is not None:
        return FeatureTap(denoiser.bottleneck)
    if solver.features == "required":
        raise ValueError(
            f"the predictor of {type(solver).__name__} reads bottleneck features, but {type(denoiser).__name__} "
            "declares no bottleneck: give it one, or use a predictor that reads none, such as LearnedTable"
        )
    return NoTap()
