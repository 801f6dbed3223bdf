"""Which precision a run computes in: bfloat16 where the device has instructions for it and they pay."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from tqdm import tqdm

from diffdistill.devices import native_bf16
from diffdistill.distributed import rank
from diffdistill.errors import one_line

ROUNDS = 2
SMALL_SECONDS = 0.03
"""Of an update in float32; the time of a smaller one is lost between its operations, and too noisy to decide on."""
WORTHWHILE = 0.75
"""The share of float32's time that bf16 may take at most: it rounds 65 536 times as coarsely, and timings are noisy."""

Precision = Literal["fp32", "bf16"]


def choose_precision(device: torch.device, update: Callable[[Precision], object]) -> Precision:
    """bf16 on a GPU that has it, and on a CPU that has it where `update` takes less time in it; fp32 otherwise.

    A line on stderr says what was chosen, and why.

    Args:
        device: of the computation.
        update: computes as much as the run will, again and again, in the precision that it is given; on a CPU it is
            called six times at most.
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
    try:
        seconds = _seconds(update, ["fp32", "bf16"])
    except (RuntimeError, NotImplementedError) as error:  # an operation without a form for bf16
        return "fp32", f"the model does not compute in bf16 here ({one_line(error)})"
    if seconds["fp32"] < SMALL_SECONDS:
        return "fp32", "an update is too small to gain by bf16"
    share = seconds["bf16"] / seconds["fp32"]
    return "bf16" if share < WORTHWHILE else "fp32", f"bf16 takes {share:.2f} of the time of float32 here"


def _seconds(update: Callable[[Precision], object], precisions: Sequence[Precision]) -> dict[Precision, float]:
    """The time of an update in each precision, at its best; in turns, so that other programs disturb all alike.

    The first round, which sets things up, does not count.
    """
    times: dict[Precision, list[float]] = {precision: [] for precision in precisions}
    for _ in range(1 + ROUNDS):
        for precision in precisions:
            start = time.perf_counter()
            update(precision)
            times[precision].append(time.perf_counter() - start)
    return {precision: min(taken[1:]) for precision, taken in times.items()}
