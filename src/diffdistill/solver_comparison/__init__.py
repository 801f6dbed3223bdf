"""Solvers on one denoiser, side by side."""

from diffdistill.solver_comparison.candidates import Candidate, Grid, learned_candidate, num_steps_for, title
from diffdistill.solver_comparison.contest import Row, best, compare, entries, measure
from diffdistill.solver_comparison.problem import Problem, reference_endpoints

__all__ = [
    "Candidate",
    "Grid",
    "Problem",
    "Row",
    "best",
    "compare",
    "entries",
    "learned_candidate",
    "measure",
    "num_steps_for",
    "reference_endpoints",
    "title",
]
