"""Models of diffusers in and out. Importing this package needs torch alone; its functions need the extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffdistill.interop.diffusers.adapters import Adapters, add_adapters, merge_adapters
from diffdistill.interop.diffusers.conventions import (
    GUIDANCE_CONVENTIONS,
    as_in_stock_pipelines,
    guidance_scale_embedding,
)
from diffdistill.interop.diffusers.export import export_student
from diffdistill.interop.diffusers.folders import load_pipeline
from diffdistill.interop.diffusers.parts import LatentCodec, Parts, from_network, from_pipeline

if TYPE_CHECKING:
    from diffdistill.interop.diffusers.scheduler import (
        SolverScheduler,
        guidance_by_level,
        scheduler_for,
        student_scheduler,
    )

__all__ = [
    "GUIDANCE_CONVENTIONS",
    "Adapters",
    "LatentCodec",
    "Parts",
    "SolverScheduler",
    "add_adapters",
    "as_in_stock_pipelines",
    "export_student",
    "from_network",
    "from_pipeline",
    "guidance_by_level",
    "guidance_scale_embedding",
    "load_pipeline",
    "merge_adapters",
    "scheduler_for",
    "student_scheduler",
]


def __getattr__(name: str) -> Any:
    # Classes of schedulers derive from those of diffusers, which are imported when they are asked for.
    if name not in ("SolverScheduler", "guidance_by_level", "scheduler_for", "student_scheduler"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffdistill.interop.diffusers import scheduler

    return getattr(scheduler, name)
