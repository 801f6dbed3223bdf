"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HARMLESS = frozenset(
    {
        "out",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep",
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
        decay: how it then falls: "constant" (not at all), "linear" or "cosine" to 0 at the end of the run, or "step" to a
            tenth in the middle of it.
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
        sample_every: updates between sample grids, or None.
        workers: processes that load data, for data sets that do not fit in memory.
        seed: of everything that is random in the run.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: a value outside its range.
    """

    updates: int
    batch_size: int
    accumulation: int = 1
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "adamw", "sgd", "adam8bit", "adamw8bit"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    clip: float | None = None
    ema_half_life: float | None = None
    ema_rampup: float | None = 0.05
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_every: int | None = 1000
    checkpoint_minutes: float | None = None
    keep: int = 2
    log_every: int = 50
    sample_every: int | None = None
    workers: int = 0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("updates", "batch_size", "accumulation", "keep", "log_every"):
            self._check(name, "a positive integer", lambda v: isinstance(v, int) and v > 0)
        for name in ("checkpoint_every", "sample_every"):
            self._check(name, "a positive integer or null", lambda v: v is None or (isinstance(v, int) and v > 0))
        for name in ("warmup", "workers"):
            self._check(name, "an integer of at least 0", lambda v: isinstance(v, int) and v >= 0)
        self._check("seed", "an integer", lambda v: isinstance(v, int))
        self._check("device", "the name of a device", lambda v: isinstance(v, str))
        for name in ("learning_rate", "eps"):
            self._check(name, "a positive number", lambda v: 0 < v < math.inf)
        for name in ("clip", "ema_half_life", "ema_rampup", "checkpoint_minutes"):
            self._check(name, "a positive number or null", lambda v: v is None or 0 < v < math.inf)
        self._check("weight_decay", "a number of at least 0", lambda v: 0 <= v < math.inf)
        self._check("betas", "two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
        for name in SWITCHES:
            self._check(name, "true or false", lambda v: isinstance(v, bool))
        for name, valid in CHOICES.items():
            self._check(name, "one of " + ", ".join(valid), lambda v, valid=valid: v in valid)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into accumulation={self.accumulation} parts"
            )

    def _check(self, name: str, valid: str, holds: Any) -> None:
        value = getattr(self, name)
        try:
            good = bool(holds(value))
        except TypeError:
            good = False
        if not good or (isinstance(value, bool) and name not in SWITCHES):
            raise ValueError(f"{name} must be {valid}, but is {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """Build from a mapping; a name that is no setting, or a missing one, is a `ValueError` that lists the names."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"the trainer has no setting {name!r}: it has {', '.join(names)}")
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


SWITCHES = ("channels_last", "compile", "recompute")
CHOICES = {
    "optimizer": ("adam", "adamw", "sgd", "adam8bit", "adamw8bit"),
    "decay": ("constant", "linear", "cosine", "step"),
    "precision": ("auto", "fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
}
DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1,
}
