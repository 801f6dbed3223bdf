"""Fast sampling from diffusion models: distillation of guided models, and learned ODE solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffdistill.models.loading import load_denoiser, save_denoiser
    from diffdistill.models.own.registration import register_network
    from diffdistill.models.own.wrapping import wrap
    from diffdistill.solvers.integration import sample

__version__ = "0.1.0"
__all__ = ["load_denoiser", "register_network", "sample", "save_denoiser", "wrap"]

_PLACES = {
    "load_denoiser": "diffdistill.models.loading",
    "register_network": "diffdistill.models.own.registration",
    "sample": "diffdistill.solvers.integration",
    "save_denoiser": "diffdistill.models.loading",
    "wrap": "diffdistill.models.own.wrapping",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import diffdistill.solvers` loads neither models nor safetensors.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
