"""Measures of samples: Fréchet and kernel distances, Inception score, precision and recall, class accuracy, copying."""

from __future__ import annotations

from diffdistill.metrics.classifier import Classifier, load_classifier
from diffdistill.metrics.collect import Collected, Keep, collect
from diffdistill.metrics.extractors import FEATURES, make_features
from diffdistill.metrics.features import Features, extract, gaussian_of
from diffdistill.metrics.frechet import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from diffdistill.metrics.kernel import Estimate, inception_score, kernel_distance, polynomial_mmd
from diffdistill.metrics.manifold import Manifold, compare_manifolds, density_coverage, precision_recall
from diffdistill.metrics.measures import MEASURES, Measured, measure, register_metric
from diffdistill.metrics.memorisation import Memorisation, measure_memorisation, nearest_distances
from diffdistill.metrics.reference import Reference, load_reference, reference_of, save_reference
from diffdistill.metrics.sources import Sampler, StoredImages, open_images

__all__ = [
    "FEATURES",
    "MEASURES",
    "Classifier",
    "Collected",
    "Estimate",
    "FeatureStatistics",
    "Features",
    "Gaussian",
    "Keep",
    "Manifold",
    "Measured",
    "Memorisation",
    "Reference",
    "Sampler",
    "StoredImages",
    "collect",
    "compare_manifolds",
    "density_coverage",
    "extract",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "load_reference",
    "load_statistics",
    "make_features",
    "measure",
    "measure_memorisation",
    "nearest_distances",
    "open_images",
    "polynomial_mmd",
    "precision_recall",
    "reference_of",
    "register_metric",
    "save_reference",
    "save_statistics",
]
