"""Euler's method; on a variance-preserving model this is DDIM (Song et al. 2021, DDIM, Eq. 13)."""

from __future__ import annotations

from torch import Tensor

from diffdistill.denoiser import per_sample
from diffdistill.solvers.base import Solver
from diffdistill.solvers.step import Interval, Step, weighted_sum


class Euler(Solver):
    """`x_next = x + (sigma_next - sigma) * eps = denoised + sigma_next * eps`. First order, one evaluation per step."""

    def update(self, step: Step) -> Tensor:
        # From the denoised image, since from x = denoised + sigma eps digits are lost where sigma is large.
        kept, scale = step.sigma_next, step.correction.scale_dir
        if scale is not None:
            kept = step.sigma + scale * (step.sigma_next - step.sigma)
        return weighted_sum(step.evaluation.denoised, None, [kept], [step.evaluation.eps])

    @staticmethod
    def invert(x: Tensor, x_next: Tensor, interval: Interval) -> Tensor:
        """The denoised image for which one step over `interval` carries `x` to `x_next`.

        This is the target of progressive distillation (Salimans and Ho 2022, Appendix G) in terms of sigma.
        """
        sigma, sigma_next = interval.sigma, interval.sigma_next
        h = sigma - sigma_next
        return per_sample(sigma / h, x) * x_next - per_sample(sigma_next / h, x) * x
