"""The gradient of a step with respect to the few predicted numbers, without a graph through the network.

The numbers of a sample move only that sample, so one forward derivative per kind of number gives its gradient for the
whole batch. Nothing of the network is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.solvers import Correction, Evaluation, ProbabilityFlow
from diffdistill.solvers.levels import Level
from diffdistill.training.forward_mode import PlainNorms

Reached = tuple[Tensor, tuple[Evaluation, ...]]
Step = Callable[[Correction, ProbabilityFlow], Reached]


class ReplayFlow(ProbabilityFlow):
    """Returns recorded answers of a denoiser, whatever the state, so that no derivative goes through it."""

    def __init__(self, denoised: list[Tensor]) -> None:
        super().__init__(lambda x, sigma, cond: next(answers))
        answers = iter(denoised)


class RecordingFlow(ProbabilityFlow):
    """Keeps the answers that another flow gives."""

    def __init__(self, flow: ProbabilityFlow) -> None:
        super().__init__(flow.denoiser, flow.cond, thresholding=flow.thresholding)
        self.answers: list[Tensor] = []

    def __call__(
        self, x: Tensor, sigma: Level, *, scale_time: Tensor | None = None, s: Tensor | None = None
    ) -> Evaluation:
        evaluation = super().__call__(x, sigma, scale_time=scale_time, s=s)
        self.answers.append(_primal(evaluation.denoised))
        return evaluation


def forward_mode_error(
    step: Step, flow: ProbabilityFlow, correction: Correction, target: Tensor
) -> tuple[Tensor, Tensor, tuple[Evaluation, ...]]:
    """Mean squared distance of a step from its target, whose gradient reaches `correction` only.

    Args:
        step: takes the step as a function of its correction and of the flow to ask.
        flow: the denoiser's.
        correction: the predicted numbers.
        target: `[B, ...]`.

    Returns:
        The error (its value, and its first derivative), the point reached, and the history; the last two detached.
    """
    numbers = {name: value for name, value in vars(correction).items() if value is not None}
    detached = replace(correction, **{name: value.detach().clone() for name, value in numbers.items()})
    recorder = RecordingFlow(flow)
    x_next, history, slopes = None, (), {}
    # The other kernels of attention have no forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), PlainNorms():
        for name in sorted(numbers, key=lambda name: name == "scale_dir"):
            # Nothing that the network is given depends on scale_dir, so its answers can be played back.
            asked = ReplayFlow(recorder.answers) if name == "scale_dir" and x_next is not None else recorder
            with forward_ad.dual_level():
                value = getattr(detached, name)
                dual = forward_ad.make_dual(value, torch.ones_like(value))
                reached, past = step(replace(detached, **{name: dual}), asked)
                primal, slopes[name] = forward_ad.unpack_dual(reached)
                if x_next is None:
                    x_next = primal
                    history = tuple(Evaluation(_primal(e.x), _primal(e.sigma), _primal(e.denoised)) for e in past)
    assert x_next is not None
    difference = x_next - target
    value = difference.square().flatten(1).sum(1).mean()
    for name, slope in slopes.items():
        if slope is not None:
            gradient = 2 * (difference * slope).flatten(1).sum(1) / len(target)
            moved = numbers[name] - numbers[name].detach()  # zero, with the derivative of the predicted number
            value = value + (gradient * moved).sum()
    return value, x_next, history


def _primal(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal.clone()
