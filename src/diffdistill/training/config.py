"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from diffdistill.settings import (
    Count,
    Integer,
    Limit,
    Natural,
    NonNegative,
    Positive,
    check_fields,
    check_names,
    hints_of,
)

Betas = Annotated[
    tuple[float, float], Limit("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
]
LogTo = Annotated[
    tuple, Limit("a list of any of tensorboard, wandb", lambda v: {*v} <= {"tensorboard", "wandb"} and v != "")
]
Device = Annotated[str, Limit("the name of a device", bool)]

HARMLESS = frozenset(
    {
        "out",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep",
        "log_to",
        "workers",
        "device",
        "parallel",
        "recompute",
    }
)
"""Settings that may change between a run and its continuation: they do not change what is computed."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train. An update is one batch of `batch_size` samples, over all processes.

    Attributes:
        updates: number of updates of the whole run.
        batch_size: samples of one update, over all processes and accumulated parts.
        accumulation: parts that each process splits its share of the batch into, to save memory.
        learning_rate: after warm-up and before decay.
        optimizer: "adam", "adamw", "sgd" (with momentum `betas[0]`), or "adam8bit", "adamw8bit" (moments of 8 bits,
            with bitsandbytes).
        betas, eps, weight_decay: of the optimiser.
        warmup: updates over which the learning rate rises linearly from 0.
        decay: how it then falls: "constant" (not at all), "linear" or "cosine" to 0 at the end of the run, or "step" to
            a tenth in the middle of it.
        clip: largest norm of the gradient, or None.
        ema_half_life: half-life of the average of the weights, in samples, or None for no average
            (EDM's training_loop.py counts the same in thousands of images).
        ema_rampup: the half-life is at most this fraction of the samples seen so far; None for no such limit.
        precision: "fp32", "bf16" by autocast, or "auto": bf16 on a GPU that has it, and on a CPU that has instructions
            for it where it is faster, which is timed at the first update. What a run began with it keeps.
        channels_last: keep images and weights in the channels-last layout.
        compile: compile the modules of the objective with torch.compile.
        recompute: gradient checkpointing: keep no activations inside the blocks of the network, compute them again.
        parallel: with several processes, "ddp" (each has the whole model) or "fsdp" (each has a part of it; not with
            PyTorch 2.6).
        checkpoint_every: updates between checkpoints; None: only at the end (and when interrupted).
        checkpoint_minutes: also a checkpoint when this much time has passed since the last one, or None.
        keep: number of checkpoints that are kept.
        log_every: updates between lines of metrics.jsonl; each line is the mean since the last one.
        log_to: trackers that are told the same as metrics.jsonl and shown the sample grids, of `trackers.TRACKERS`.
        sample_every: updates between sample grids, or None.
        workers: processes that load data, for data sets that do not fit in memory.
        seed: of everything that is random in the run.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: a value outside its range.
    """

    updates: Count
    batch_size: Count
    accumulation: Count = 1
    learning_rate: Positive = 1e-3
    optimizer: Literal["adam", "adamw", "sgd", "adam8bit", "adamw8bit"] = "adam"
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    warmup: Natural = 0
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    clip: Positive | None = None
    ema_half_life: Positive | None = None
    ema_rampup: Positive | None = 0.05
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_every: Count | None = 1000
    checkpoint_minutes: Positive | None = None
    keep: Count = 2
    log_every: Count = 50
    log_to: LogTo = ()
    sample_every: Count | None = None
    workers: Natural = 0
    seed: Integer = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("betas", "log_to"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into accumulation={self.accumulation} parts"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """Build from a mapping; a name that is no setting, or a missing one, is a `ValueError` that lists the names."""
        check_names("the trainer", values, hints_of(cls), noun="setting", error=ValueError)
        for name in ("updates", "batch_size"):
            if name not in values:
                raise ValueError(f"the trainer needs the setting {name!r}")
        return cls(**values)

    def learning_rate_at(self, update: int) -> float:
        """The learning rate of update 0, 1, ..., `updates - 1`."""
        if update < self.warmup:
            return self.learning_rate * (update + 1) / self.warmup
        progress = (update - self.warmup) / max(self.updates - self.warmup, 1)
        return self.learning_rate * DECAYS[self.decay](progress)

    def ema_decay_at(self, update: int) -> float:
        """The weight that the average keeps in update 0, 1, ...: a half-life in samples, with EDM's ramp-up."""
        if self.ema_half_life is None:
            return 0.0
        half_life = self.ema_half_life
        if self.ema_rampup is not None:
            half_life = min(half_life, update * self.batch_size * self.ema_rampup)
        return 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0


DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1,
}
