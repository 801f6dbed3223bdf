"""All measures of one source of images, as a record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import diffdistill.distributed as distributed
from diffdistill.data import Data
from diffdistill.data.captions import read_captions
from diffdistill.files.atomic import write_text
from diffdistill.metrics.collect import Source, collect, parts_of, shard
from diffdistill.metrics.extractors import make_features
from diffdistill.metrics.measures import MEASURES, Measured, measure, needed, spread
from diffdistill.metrics.sources import reference_from


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure.

    Attributes:
        features: name of the feature extractor.
        reference: a file of statistics; None computes them from data.
        measures: names of `MEASURES`.
        splits: parts of the samples for the spread.
        captions: for the CLIP score, as of `read_captions`: by the images' names, or one a line.
        clip: the CLIP model for it.
        batch_size: images at a time.
    """

    features: str
    reference: str | None = None
    measures: Sequence[str] = ("fid",)
    splits: int = 5
    captions: str | None = None
    clip: str | None = None
    batch_size: int = 250

    def __post_init__(self) -> None:
        needed(self.measures)
        if not self.measures and self.captions is None:
            raise ValueError(f"nothing to measure: give measures, of {', '.join(MEASURES)}, or captions and clip")
        if (self.captions is None) != (self.clip is None):
            raise ValueError("the CLIP score needs captions=FILE and clip=MODEL together")


class Replayed:
    """A source that is gone through once and kept, for two extractors that look at the same images."""

    def __init__(self, source: Source) -> None:
        self.source, self.shape, self.mixed, self.names = source, source.shape, source.mixed, source.names
        self._kept: list[tuple[Tensor, Tensor | None]] = []

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, indices: range, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        if not self._kept:
            for x, y in self.source.batches(indices, batch_size, device):
                self._kept.append((x.cpu(), y))
        for x, y in self._kept:
            yield x.to(device), y


def evaluate(
    source: Source, options: EvaluationOptions, *, data: Data | Mapping[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """Measure the images of a source.

    Args:
        source: stored images, or a sampler; every process takes its share.
        options: what to measure.
        data: the reference where `options` names no file: a data set, or options of `load_data`.
        device: where to compute.

    Returns:
        A record of plain values: `measures` by name, what they were computed with, and the number of images.

    Raises:
        ValueError: settings that do not fit each other or the images.
        FileNotFoundError, ImportError: what a measure needs is not there.
    """
    splits = min(options.splits, len(source))
    if "fid" in options.measures and splits > 1 and len(source) < 2 * splits:
        raise ValueError(
            f"splits={splits}: a part needs 2 images for its covariance, and there are {len(source)} in all: give "
            f"splits={max(len(source) // 2, 1)}, or 1 for no spread"
        )
    record: dict[str, Any] = {"num_samples": len(source), "splits": splits, "measures": {}}
    if options.captions is not None:
        source = Replayed(source)
        record["measures"]["clip_score"] = asdict(_clip_score(source, options, splits, device))
        record["clip"] = options.clip
    if options.measures:
        features = make_features(options.features)
        if options.reference is None and data is None:
            raise ValueError("give reference=FILE, or data=NAME to compute it from")
        given = {"data": data} if options.reference is None else {"file": options.reference}
        reference = reference_from(given, features, options.measures, device=device, batch_size=options.batch_size)
        collected = collect(
            source,
            features,
            keep=needed(options.measures),
            splits=options.splits,
            batch_size=options.batch_size,
            device=device,
        )
        found = measure(collected, reference, features, options.measures)
        record["measures"].update({name: asdict(value) for name, value in found.items()})
        record.update(features=features.name, weights=features.weights)
        named = dict(data) if isinstance(data, Mapping) else {"samples": len(data or ())}
        record["reference"] = options.reference or named
    return record


def _clip_score(source: Source, options: EvaluationOptions, splits: int, device: torch.device) -> Measured:
    from diffdistill.metrics.clip import CLIPScore

    captions = read_captions(str(options.captions), len(source), source.names)
    score, indices = CLIPScore(model=str(options.clip)), shard(len(source))
    values, start = [], indices.start
    for x, _ in source.batches(indices, options.batch_size, device):
        values.append(score(x, captions[start : start + len(x)]).cpu())
        start += len(x)
    scores = torch.cat([part for parts in distributed.gather(values) for part in parts]).double()
    part_of = parts_of(source, splits)
    return spread(float(scores.mean()), [float(scores[part_of == k].mean()) for k in range(splits)])


def describe(record: Mapping[str, Any]) -> str:
    """The measures as text, one a line."""
    lines = [f"{record['num_samples']} samples"]
    for name, values in record["measures"].items():
        label, found = MEASURES[name].label if name in MEASURES else name.replace("_", " "), Measured(**values)
        parts = "" if found.part_std is None else f" over {record.get('splits')} parts"
        lines.append(f"{label}: {found}{parts}")
    return "\n".join(lines)


def write_record(record: Mapping[str, Any], settings: Mapping[str, Any], path: str | os.PathLike[str] | None) -> None:
    """Write a record with the settings that made it as JSON; nothing where there is no path."""
    if path is not None:
        write_text(path, json.dumps({**record, "settings": dict(settings)}, indent=1, default=str) + "\n")
