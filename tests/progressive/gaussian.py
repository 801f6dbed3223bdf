"""A Gaussian, whose flow map is known: what every method of few steps should find."""

import torch

from diffdistill.denoiser import Denoiser, per_sample
from diffdistill.solvers import Solver


class GaussianFlow(Denoiser):
    """N(mean, variance I) as a flow map: `D(x, sigma, s)` leads one Euler step to where the exact flow arrives.

    With w the variance is divided by 1 + w, as a guidance that narrows.
    """

    sigma_data = 0.7
    data_shape = (2, 5, 7)
    flow_map = True

    def __init__(self, *, variance=0.5, w_range=None):
        super().__init__()
        self.mean, self.variance, self.w_range = 0.3, variance, w_range
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma, cond=None, w=None, s=None):
        s = sigma if s is None else s
        v = self.variance if w is None else self.variance / (1 + w)
        u, root = s / sigma, ((v + s**2) / (v + sigma**2)).sqrt()
        # (root - u) / (1 - u), where the difference of squares takes the zero of 1 - u away.
        keep = v * (1 + u) / ((v + sigma**2) * (root + u))
        return self.mean + per_sample(keep, x) * (x - self.mean) + self.parameter

    def arrive(self, x, sigma, s):
        """Where the flow is at s."""
        root = ((self.variance + s**2) / (self.variance + sigma**2)).sqrt()
        return self.mean + per_sample(root, x) * (x - self.mean)


class ExactHop(Solver):
    """The exact flow of a Gaussian as a solver."""

    def __init__(self, flow):
        super().__init__()
        self.exact = flow

    def step(self, flow, x, interval, history=(), *, evaluation=None, correction=None, noise=None):
        return self.exact.arrive(x, interval.sigma, interval.sigma_next), ()

    def update(self, *args):
        raise NotImplementedError


def levels(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]
