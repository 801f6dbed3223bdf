"""The measuring of samples as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffdistill.data import as_data, load_data
from diffdistill.denoiser import Denoiser
from diffdistill.devices import device_of
from diffdistill.metrics.evaluate import EvaluationOptions
from diffdistill.metrics.evaluate import evaluate as measured
from diffdistill.metrics.measures import Measured
from diffdistill.metrics.sources import Sampler, StoredImages
from diffdistill.sampling.plans import plan
from diffdistill.workflows import runs


def evaluate(
    model: Denoiser | runs.Path_ | Any,
    data: Any = None,
    *,
    num_samples: int = 10_000,
    measures: Sequence[str] = ("fid",),
    features: str = "pixels",
    reference: str | None = None,
    w: float | None = None,
    num_steps: int | None = None,
    solver: Mapping[str, Any] | str | None = None,
    schedule: Mapping[str, Any] | None = None,
    seed: int = 0,
    splits: int = 5,
    batch_size: int = 250,
    device: str | None = None,
) -> dict[str, Measured]:
    """Measure samples of a model, or samples as they are, against data.

    Args:
        model: a model, or the name of a shipped one or the path of a model; or samples in a form of
            `diffdistill.data.as_data` other than a path.
        data: what to compare with, as of `as_data`, or options of `load_data`.
        num_samples: how many the model draws.
        measures: names of `diffdistill.metrics.MEASURES`.
        features: name of the feature extractor, such as "inception"; "pixels" are the samples themselves.
        reference: a file of statistics, in place of `data`.
        w: as of `sample`, like those below.
        num_steps: steps of the schedule.
        solver: name or options.
        schedule: options.
        seed: of the first sample.
        splits: parts of the samples for the spread.
        batch_size: samples at a time.
        device: where to compute, by default where the model is.

    Returns:
        The measures by name, each with its spread.

    Raises:
        ValueError: settings that do not fit each other or the samples.
    """
    named = {"name": solver} if isinstance(solver, str) else solver
    if isinstance(model, (Denoiser, str)) or hasattr(model, "__fspath__"):
        denoiser = runs.opened_model(model)
        place = device_of(denoiser if device is None else device)
        planned = plan(denoiser.to(place), w=w, solver=named, num_steps=num_steps, schedule=schedule)
        source: Any = Sampler(planned, num_samples, seed=seed)
    else:
        place, source = device_of(device or "cpu"), StoredImages(as_data(model))
    if data is not None and not (isinstance(data, Mapping) and "name" in data):
        data = as_data(data, shape=source.shape)
    elif data is not None:
        data = load_data(**data)
    options = EvaluationOptions(
        features=features, reference=reference, measures=tuple(measures), splits=splits, batch_size=batch_size
    )
    record = measured(source, options, data=data, device=place)
    return {name: Measured(**values) for name, values in record["measures"].items()}
