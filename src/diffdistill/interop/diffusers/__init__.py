"""Models of diffusers in and out. Importing this package needs torch alone; its functions need the extra."""

from diffdistill.interop.diffusers.adapters import Adapters, add_adapters, merge_adapters
from diffdistill.interop.diffusers.conventions import (
    GUIDANCE_CONVENTIONS,
    as_in_stock_pipelines,
    guidance_scale_embedding,
)
from diffdistill.interop.diffusers.export import export_student
from diffdistill.interop.diffusers.folders import load_pipeline
from diffdistill.interop.diffusers.parts import LatentCodec, Parts, from_network, from_pipeline

__all__ = [
    "GUIDANCE_CONVENTIONS",
    "Adapters",
    "LatentCodec",
    "Parts",
    "add_adapters",
    "as_in_stock_pipelines",
    "export_student",
    "from_network",
    "from_pipeline",
    "guidance_scale_embedding",
    "load_pipeline",
    "merge_adapters",
]
