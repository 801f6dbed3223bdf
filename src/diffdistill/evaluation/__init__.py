"""Measures of samples: Fréchet and kernel distances, Inception score, precision and recall, class accuracy, copying."""

from __future__ import annotations

from diffdistill.evaluation.classifier import DigitClassifier, load_classifier
from diffdistill.evaluation.features import FEATURES, Features, extract, gaussian_of, make_features
from diffdistill.evaluation.frechet import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from diffdistill.evaluation.kernel import Estimate, inception_score, kernel_distance, polynomial_mmd
from diffdistill.evaluation.manifold import Manifold, compare_manifolds, density_coverage, precision_recall
from diffdistill.evaluation.memorisation import Memorisation, measure_memorisation, nearest_distances
from diffdistill.evaluation.report import Measures, evaluate_samples

__all__ = [
    "FEATURES",
    "DigitClassifier",
    "Estimate",
    "FeatureStatistics",
    "Features",
    "Gaussian",
    "Manifold",
    "Measures",
    "Memorisation",
    "compare_manifolds",
    "density_coverage",
    "evaluate_samples",
    "extract",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "load_statistics",
    "make_features",
    "measure_memorisation",
    "nearest_distances",
    "polynomial_mmd",
    "precision_recall",
    "save_statistics",
]
