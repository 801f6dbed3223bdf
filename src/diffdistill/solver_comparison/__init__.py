"""Solvers on one denoiser, side by side."""

from diffdistill.solver_comparison.candidates import Candidate, Grid, learned_candidate, num_steps_for, predictor_name
from diffdistill.solver_comparison.problem import Problem, reference_endpoints
from diffdistill.solver_comparison.ranking import Measurement, best, compare, entries, measure_candidate

__all__ = [
    "Candidate",
    "Grid",
    "Measurement",
    "Problem",
    "best",
    "compare",
    "entries",
    "learned_candidate",
    "measure_candidate",
    "num_steps_for",
    "predictor_name",
    "reference_endpoints",
]
