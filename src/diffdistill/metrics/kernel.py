"""Kernel distance (KID) and Inception score, from given features or logits.

Equal to torch-fidelity's, which the tests compare; in float64, on any device, and without that optional package.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A measure computed on several subsets: their mean and standard deviation (divided by their number)."""

    mean: float
    std: float


def polynomial_mmd(x: Tensor, y: Tensor, *, degree: int = 3) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(x.y / D + 1)^degree` (Binkowski et al. 2018, Eq. 4).

    Args:
        x: features `[M, D]`.
        y: features `[N, D]`.
        degree: of the polynomial.

    Raises:
        ValueError: different D, or fewer than 2 samples.
    """
    x, y = _features(x), _features(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of size {x.shape[1]} cannot be compared with features of size {y.shape[1]}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the unbiased estimate needs at least 2 samples, not {min(len(x), len(y))}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** degree

    def within(a: Tensor) -> Tensor:
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int = 1000, degree: int = 3, seed: int = 2020
) -> Estimate:
    """KID: `polynomial_mmd` averaged over random subsets, drawn as torch-fidelity draws them for the same seed.

    Args:
        x: features of samples `[M, D]` (torch-fidelity's first input).
        y: features of the reference `[N, D]`.
        subsets: number of subsets.
        subset_size: samples in each, drawn without replacement.
        degree: of the kernel.
        seed: of the choice of subsets.

    Raises:
        ValueError: fewer samples than `subset_size`, or different D.
    """
    fewest = min(len(x), len(y))
    if subset_size > fewest:
        raise ValueError(f"subset_size={subset_size} is more than the {fewest} samples there are")
    if subsets < 1:
        raise ValueError(f"subsets is at least 1, not {subsets}")
    stream = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen_x = torch.from_numpy(stream.choice(len(x), subset_size, replace=False))
        chosen_y = torch.from_numpy(stream.choice(len(y), subset_size, replace=False))
        values.append(polynomial_mmd(x[chosen_x], y[chosen_y], degree=degree))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def inception_score(logits: Tensor, *, splits: int = 10, seed: int | None = 2020) -> Estimate:
    """`exp E KL(p(y|x) || p(y))` on each of several equal parts (Salimans et al. 2016, Sec. 4).

    Args:
        logits: `[N, K]`; log-probabilities serve as well.
        splits: number of parts.
        seed: of the shuffle before the split, as torch-fidelity's; None keeps the order.

    Raises:
        ValueError: fewer samples than parts.
    """
    logits = _features(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits={splits} is outside 1 to {len(logits)}, the number of samples")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    ends = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(ends):
        log_p = logits[start:end].log_softmax(dim=1)
        log_q = log_p.logsumexp(dim=0) - float(np.log(end - start))
        # A class of probability zero adds nothing, whatever its logarithm.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        scores.append(float(terms.sum(dim=1).mean().exp()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def _features(values: Tensor) -> Tensor:
    values = torch.as_tensor(values).double()
    if values.ndim != 2:
        raise ValueError(f"expected a matrix with one row per sample, not shape {list(values.shape)}")
    return values
