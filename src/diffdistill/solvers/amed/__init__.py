"""AMED-Solver and AMED-Plugin (Zhou et al. 2024, Fast ODE-based Sampling for Diffusion Models in Around 5 Steps)."""

from diffdistill.solvers.amed.linear import LinearSteps, LinearTable
from diffdistill.solvers.amed.network import AMEDPredictor
from diffdistill.solvers.amed.plugin import AMED, AMEDPlugin, MeanDirection
from diffdistill.solvers.amed.predictors import (
    FunctionPredictor,
    LearnedTable,
    Predictor,
    RowPredictor,
    TabulatedPredictor,
)
from diffdistill.solvers.amed.steps import LearnedSteps

__all__ = [
    "AMED",
    "AMEDPlugin",
    "AMEDPredictor",
    "FunctionPredictor",
    "LearnedSteps",
    "LearnedTable",
    "LinearSteps",
    "LinearTable",
    "MeanDirection",
    "Predictor",
    "RowPredictor",
    "TabulatedPredictor",
]
