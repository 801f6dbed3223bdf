"""Which precision a run computes in: bfloat16 where the device has instructions for it and they pay."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from tqdm import tqdm

from diffdistill.devices import native_bf16
from diffdistill.distributed import rank
from diffdistill.errors import one_line

ROUNDS = 2
WORTHWHILE = 0.75
"""The share of float32's time that bf16 may take at most: it rounds 65 536 times as coarsely, and timings are noisy."""

Precision = Literal["fp32", "bf16"]


def choose_precision(device: torch.device, update: Callable[[Precision], object]) -> Precision:
    """bf16 on a GPU that has it, and on a CPU that has it where `update` takes less time in it; fp32 otherwise.

    A line on stderr says what was chosen, and why.

    Args:
        device: of the computation.
        update: computes as much as the run will, again and again, in the precision that it is given; on a CPU it is
            called up to six times.
    """
    chosen, reason = _chosen(device, update)
    if rank() == 0:
        tqdm.write(f"precision={chosen}: {reason}", file=sys.stderr)
    return chosen


def _chosen(device: torch.device, update: Callable[[Precision], object]) -> tuple[Precision, str]:
    """The precision, and the reason in words."""
    if not native_bf16(device):
        return "fp32", f"this {'GPU' if device.type == 'cuda' else 'CPU'} has no instructions for bf16"
    if device.type == "cuda":
        return "bf16", "this GPU has instructions for it"
    plain = _seconds(update, "fp32")
    try:
        share = _seconds(update, "bf16") / plain
    except (RuntimeError, NotImplementedError) as error:  # an operation without a form for bf16
        return "fp32", f"the model does not compute in bf16 here ({one_line(error)})"
    return "bf16" if share < WORTHWHILE else "fp32", f"bf16 takes {share:.2f} of the time of float32 here"


def _seconds(update: Callable[[Precision], object], precision: Precision) -> float:
    """The time of one update, at its best; the first one, which sets things up, does not count."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        update(precision)
        times.append(time.perf_counter() - start)
    return min(times[1:])
