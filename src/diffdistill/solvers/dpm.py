"""Single-step DPM-Solver and DPM-Solver++ (Lu et al. 2022, DPM-Solver, Algorithms 1-2; DPM-Solver++, Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from diffdistill.solvers.base import Solver
from diffdistill.solvers.exponential import FORMS, Form
from diffdistill.solvers.levels import Level
from diffdistill.solvers.step import AFS, Step


def _level(step: Step, place: Level) -> Level:
    """The noise level at `place` in (0, 1] of the step, on a log grid."""
    return step.sigma_next**place * step.sigma ** (1 - place)


class DPM2(Solver):
    """DPM-Solver-2: two evaluations per step, second order, extrapolating the noise.

    A learned correction moves the second stage (`r`), scales the sigma that the network is given there
    (`scale_time`), the way to it (`scale_first`) and the whole network-dependent term of the step (`scale_dir`).

    Args:
        r: place of the second stage, `sigma_mid = sigma_next**r * sigma**(1 - r)`, in (0, 1].
        afs: analytical first step; the second stage is evaluated.
    """

    stages = 2
    form: ClassVar[Form] = FORMS["eps"]

    def __init__(self, *, r: float = 0.5, afs: AFS = False) -> None:
        super().__init__(afs=afs)
        if not 0 < r <= 1:
            raise ValueError(f"r must be in (0, 1], but is {r}")
        self.r = r

    def update(self, step: Step) -> Tensor:
        learned = step.correction
        r = self.r if learned.r is None else learned.r
        start, sigma_mid = self.form.output(step.evaluation), _level(step, r)
        linear = self.form.linear(step.sigma, sigma_mid)
        x_mid = linear.advance(step.x, linear.psi(1), [start], learned.scale_first)
        middle = self.form.output(step.flow(x_mid, sigma_mid, scale_time=learned.scale_time))

        linear = self.form.linear(step.sigma, step.sigma_next)
        (psi,) = linear.psi(1)
        slope = psi * (0.5 / r)
        return linear.advance(step.x, [psi - slope, slope], [start, middle], learned.scale_dir)


class DPMpp2S(DPM2):
    """DPM-Solver++(2S): two evaluations per step, second order, extrapolating the denoised image."""

    form: ClassVar[Form] = FORMS["x0"]


class DPM3(Solver):
    """DPM-Solver-3: three evaluations per step, third order, extrapolating the noise. Stages at 1/3 and 2/3.

    Args:
        afs: analytical first step; the other two stages are evaluated.
    """

    stages = 3
    takes_correction = False
    form: ClassVar[Form] = FORMS["eps"]

    def update(self, step: Step) -> Tensor:
        start, flow = self.form.output(step.evaluation), step.flow
        r1, r2 = 1 / 3, 2 / 3
        sigma_1, sigma_2 = _level(step, r1), _level(step, r2)

        x_1 = self._stage(step, sigma_1, [start])
        x_2 = self._stage(step, sigma_2, [start, self.form.output(flow(x_1, sigma_1))], r2 / r1)
        return self._stage(step, step.sigma_next, [start, self.form.output(flow(x_2, sigma_2))], 1 / r2)

    def _stage(self, step: Step, sigma_next: Level, outputs: list[Tensor], stretch: float = 1) -> Tensor:
        """The state at `sigma_next`, with the slope `stretch` times the difference of two answers if there are two."""
        linear = self.form.linear(step.sigma, sigma_next)
        psi = linear.psi(len(outputs))
        weights = psi if len(outputs) == 1 else [psi[0] - stretch * psi[1], stretch * psi[1]]
        return linear.advance(step.x, weights, outputs)


class DPMpp3S(DPM3):
    """DPM-Solver++(3S): three evaluations per step, third order, extrapolating the denoised image."""

    form: ClassVar[Form] = FORMS["x0"]
