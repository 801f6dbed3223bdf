"""Fast sampling from diffusion models: distillation of guided models, and learned ODE solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffdistill.models.loading import load_denoiser
    from diffdistill.solvers.integration import sample

__version__ = "0.1.0"
__all__ = ["load_denoiser", "sample"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import diffdistill.solvers` loads neither models nor safetensors.
    if name == "sample":
        from diffdistill.solvers.integration import sample

        return sample
    if name == "load_denoiser":
        from diffdistill.models.loading import load_denoiser

        return load_denoiser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
