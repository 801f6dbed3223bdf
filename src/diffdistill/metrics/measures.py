"""Measures by name, of samples against a reference, with their spread over parts of the samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from diffdistill.metrics.collect import Collected, Keep
from diffdistill.metrics.features import Features
from diffdistill.metrics.frechet import frechet_distance
from diffdistill.metrics.kernel import inception_score, kernel_distance
from diffdistill.metrics.manifold import density_coverage, precision_recall
from diffdistill.metrics.reference import Reference
from diffdistill.registry import choose, enter
from diffdistill.reports.text import number

KID_SUBSET = 1000
INCEPTION_SPLITS = 10


@dataclass(frozen=True)
class Measured:
    """One measure of a set of samples.

    Attributes:
        value: on all samples.
        part_mean, part_std: mean and standard deviation (of a sample, divided by their number less one) over the
            parts, or None where there is one part. A part has fewer samples, which biases the Fréchet distance
            upwards: the spread, not the mean of the parts, says how sure `value` is.
    """

    value: float
    part_mean: float | None = None
    part_std: float | None = None

    def __str__(self) -> str:
        """The value, and its spread where there is one."""
        spread = "" if self.part_std is None else f" ± {number(self.part_std, 2)}"
        return number(self.value) + spread


@dataclass(frozen=True)
class Measure:
    """How to compute a measure.

    Attributes:
        compute: from samples and reference, by name; measures that share work share this function.
        better: "lower" or "higher".
        keep: what of the samples it needs.
        reference_features: whether it needs all features of the reference, not only their mean and covariance.
        label: how tables write it.
    """

    compute: Callable[[Collected, Reference], dict[str, float]]
    better: str
    label: str
    keep: Keep = field(default_factory=Keep)
    reference_features: bool = False


def _frechet(samples: Collected, reference: Reference) -> dict[str, float]:
    return {"fid": frechet_distance(samples.statistics.gaussian(), reference.gaussian)}


def _kernel(samples: Collected, reference: Reference) -> dict[str, float]:
    x, y = _rows(samples, reference)
    return {"kid": kernel_distance(x, y, subset_size=min(KID_SUBSET, len(x), len(y))).mean}


def _precision_recall(samples: Collected, reference: Reference) -> dict[str, float]:
    return dict(zip(("precision", "recall"), precision_recall(*_rows(samples, reference)), strict=True))


def _density_coverage(samples: Collected, reference: Reference) -> dict[str, float]:
    return dict(zip(("density", "coverage"), density_coverage(*_rows(samples, reference)), strict=True))


def _inception_score(samples: Collected, reference: Reference) -> dict[str, float]:
    if samples.logits is None:
        raise ValueError("the Inception score needs logits, which this feature extractor does not give")
    score = inception_score(samples.logits, splits=min(INCEPTION_SPLITS, len(samples.logits)))
    return {"inception_score": score.mean}


def _accuracy(samples: Collected, reference: Reference) -> dict[str, float]:
    if samples.logits is None or samples.labels is None or bool((samples.labels < 0).any()):
        raise ValueError("class accuracy needs labelled samples and a feature extractor that is their classifier")
    return {"accuracy": float((samples.logits.argmax(dim=1) == samples.labels).double().mean())}


def _rows(samples: Collected, reference: Reference) -> tuple[Tensor, Tensor]:
    assert samples.features is not None and reference.features is not None
    return samples.features, reference.features


ROWS, LOGITS = Keep(features=True), Keep(logits=True)

MEASURES: dict[str, Measure] = {
    "fid": Measure(_frechet, "lower", "Fréchet distance"),
    "kid": Measure(_kernel, "lower", "kernel distance", ROWS, True),
    "inception_score": Measure(_inception_score, "higher", "Inception score", LOGITS),
    "precision": Measure(_precision_recall, "higher", "precision", ROWS, True),
    "recall": Measure(_precision_recall, "higher", "recall", ROWS, True),
    "density": Measure(_density_coverage, "higher", "density", ROWS, True),
    "coverage": Measure(_density_coverage, "higher", "coverage", ROWS, True),
    "accuracy": Measure(_accuracy, "higher", "class accuracy", LOGITS),
}


M = TypeVar("M", bound=Callable[[Tensor, Tensor], Any])


def register_metric(name: str, *, better: Literal["lower", "higher"], label: str | None = None) -> Callable[[M], M]:
    """A decorator that gives a function of features a name among the measures.

    The function maps the features of the samples, float32 `[N, D]`, and of the reference, `[M, D]`, to a number. With
    `features=pixels` they are the samples themselves, flattened.

    Args:
        name: a word of letters, digits, "_" and "-".
        better: whether a "lower" or a "higher" value is better.
        label: how tables write it; by default the name.

    Raises:
        ValueError: the name is taken, or is no word, or `better` is neither.
    """
    choose("direction", better, {"lower": None, "higher": None})

    def decorate(function: M) -> M:
        def compute(samples: Collected, reference: Reference) -> dict[str, float]:
            return {name: float(function(*_rows(samples, reference)))}

        entry = Measure(compute, better, label or name.replace("_", " "), ROWS, reference_features=True)
        enter("measure", name, MEASURES, entry, made_by=function)
        return function

    return decorate


def needed(names: Sequence[str]) -> Keep:
    """What samples must keep for these measures.

    Raises:
        ValueError: an unknown measure.
    """
    chosen = [choose("measure", name, MEASURES).keep for name in names]
    return Keep(features=any(keep.features for keep in chosen), logits=any(keep.logits for keep in chosen))


def needs_reference_features(names: Sequence[str]) -> bool:
    """Whether one of these measures needs all features of the reference."""
    return any(choose("measure", name, MEASURES).reference_features for name in names)


def measure(samples: Collected, reference: Reference, features: Features, names: Sequence[str]) -> dict[str, Measured]:
    """Compute measures of samples by name.

    Args:
        samples: from `collect`, with what `needed(names)` says.
        reference: of the same feature extractor.
        features: the extractor.
        names: of `MEASURES`.

    Raises:
        ValueError: an unknown measure, a reference of other features or images, or one that lacks what is needed.
    """
    reference.check(features, samples)
    if reference.features is None and needs_reference_features(names):
        wanting = [name for name in names if MEASURES[name].reference_features]
        raise ValueError(
            f"the reference holds no features, only their mean and covariance, and {', '.join(wanting)} cannot do "
            "without: make it with keep_features=true"
        )
    if "accuracy" in names and not features.num_classes:
        raise ValueError(f"class accuracy needs a classifier of the data's classes, which {features.name} is not")
    parts = [samples.part(k) for k in range(len(samples.parts))] if len(samples.parts) > 1 else []
    found: dict[str, Measured] = {}
    for compute in dict.fromkeys(MEASURES[name].compute for name in names):
        whole = compute(samples, reference)
        with warnings.catch_warnings():  # that a part has few samples was said of the whole, or is no fault
            warnings.simplefilter("ignore", UserWarning)
            of_parts = [compute(part, reference) for part in parts]
        found |= {name: spread(value, [values[name] for values in of_parts]) for name, value in whole.items()}
    return {name: found[name] for name in names}


def spread(value: float, parts: Sequence[float]) -> Measured:
    """A value with mean and standard deviation over its parts."""
    if len(parts) < 2:
        return Measured(value)
    mean = math.fsum(parts) / len(parts)
    return Measured(value, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in parts) / (len(parts) - 1)))
