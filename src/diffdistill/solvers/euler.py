"""Euler's method; on a variance-preserving model this is DDIM (Song et al. 2021, DDIM, Eq. 13)."""

from __future__ import annotations

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.base import Solver
from diffdistill.solvers.flow import ProbabilityFlow
from diffdistill.solvers.step import Correction, Evaluation, History, Interval, weighted_sum


class Euler(Solver):
    """`x_next = x + (sigma_next - sigma) * eps = denoised + sigma_next * eps`. First order, one evaluation per step."""

    def update(
        self,
        flow: ProbabilityFlow,
        evaluation: Evaluation,
        interval: Interval,
        history: History,
        correction: Correction | None,
    ) -> Tensor:
        sigma, sigma_next = interval.ends
        # From the denoised image, since from x = denoised + sigma eps digits are lost where sigma is large.
        kept = sigma_next
        if correction is not None and correction.scale_dir is not None:
            kept = sigma + correction.scale_dir * (sigma_next - sigma)
        return weighted_sum(evaluation.denoised, None, [kept], [evaluation.eps])

    @staticmethod
    def invert(x: Tensor, x_next: Tensor, interval: Interval) -> Tensor:
        """The denoised image for which one step over `interval` carries `x` to `x_next`.

        This is the target of progressive distillation (Salimans and Ho 2022, Appendix G) in terms of sigma.
        """
        sigma, sigma_next = interval.sigma, interval.sigma_next
        h = sigma - sigma_next
        return per_sample(sigma / h, x) * x_next - per_sample(sigma_next / h, x) * x
