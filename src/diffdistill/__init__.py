"""Fast sampling from diffusion models: distillation of guided models, and learned ODE solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffdistill.data import load_data, register_data
    from diffdistill.metrics.measures import register_metric
    from diffdistill.models.loading import load_denoiser, save_denoiser
    from diffdistill.models.own.registration import register_network
    from diffdistill.models.own.wrapping import wrap
    from diffdistill.solvers import register_solver
    from diffdistill.workflows.evaluation import evaluate
    from diffdistill.workflows.guidance import distill_guidance
    from diffdistill.workflows.sampling import sample
    from diffdistill.workflows.solver import train_solver
    from diffdistill.workflows.steps import distill_steps
    from diffdistill.workflows.teacher import train_teacher

__version__ = "0.1.0"
__all__ = [
    "distill_guidance",
    "distill_steps",
    "evaluate",
    "load_data",
    "load_denoiser",
    "register_data",
    "register_metric",
    "register_network",
    "register_solver",
    "sample",
    "save_denoiser",
    "train_solver",
    "train_teacher",
    "wrap",
]

_PLACES = {
    "distill_guidance": "workflows.guidance",
    "distill_steps": "workflows.steps",
    "evaluate": "workflows.evaluation",
    "load_data": "data",
    "load_denoiser": "models.loading",
    "register_data": "data",
    "register_metric": "metrics.measures",
    "register_network": "models.own.registration",
    "register_solver": "solvers",
    "sample": "workflows.sampling",
    "save_denoiser": "models.loading",
    "train_solver": "workflows.solver",
    "train_teacher": "workflows.teacher",
    "wrap": "models.own.wrapping",
}
"""Where each is defined, below this package."""


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import diffdistill.solvers` loads neither models nor safetensors.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
