"""Preconditioning: four coefficient functions of sigma turn any network F into a denoiser.

`D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)` (Karras et al. 2022, Eq. 7 and Table 1). Every function maps
`sigma: [B]` in float64 to `[B]` in float64, and is differentiable in sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.registry import construct
from diffdistill.solvers.discrete_time import iddpm_table, interpolate, make_table
from diffdistill.solvers.levels import level_dtype


class Preconditioning(nn.Module):
    """The four coefficient functions. Constants of theirs stay in float64 and out of the state."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def c_out(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def c_in(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def c_noise(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Preconditioning:
        # Constants follow the network to its device, but not to its dtype; float32 where the device has no float64.
        def move(t: Tensor) -> Tensor:
            device = fn(t.float()).device
            return t.to(device, level_dtype(device))

        return super()._apply(move, recurse)


class EDM(Preconditioning):
    """Karras et al. 2022, Table 1; and consistency models (Song et al. 2023, Appendix C) by the two other options.

    Args:
        sigma_data: standard deviation of the data.
        time_scale: multiplies `c_noise = log(sigma) / 4`; 1000 for consistency models.
        boundary: the sigma at which `D(x, sigma) = x` exactly; that is `sigma_min` for consistency models.
    """

    def __init__(self, *, sigma_data: float = 0.5, time_scale: float = 1.0, boundary: float = 0.0) -> None:
        super().__init__()
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be a positive number, but is {sigma_data}")
        self.sigma_data = sigma_data
        self.time_scale = time_scale
        self.boundary = boundary

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / ((sigma - self.boundary) ** 2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return self.sigma_data * (sigma - self.boundary) / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.time_scale * sigma.log() / 4


class VE(Preconditioning):
    """NCSN++ (Song et al. 2021; Karras et al. 2022, Table 1)."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return (sigma / 2).log()


class _VariancePreserving(Preconditioning):
    """Input and output of networks that predict the noise in `x / sqrt(1 + sigma^2)`."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma**2).sqrt()


class VP(_VariancePreserving):
    """DDPM++ in continuous time (Song et al. 2021; Karras et al. 2022, Table 1).

    Args:
        beta_d, beta_min: of the linear noise schedule, `sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1`.
        steps: the network is given `(steps - 1) t`, t in (0, 1].
    """

    def __init__(self, *, beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000) -> None:
        super().__init__()
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.steps = steps

    def c_noise(self, sigma: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt()
        return (self.steps - 1) * (root - self.beta_min) / self.beta_d


class EpsPrediction(_VariancePreserving):
    """Networks of discrete time that predict the noise: DDPM, LDM, Stable Diffusion 1.

    Args:
        table: the `[T]` noise levels of the model, increasing, or the name of a known table: "scaled_linear" (latent
            diffusion), "linear" (DDPM), "iddpm". `c_noise` is the place of sigma in it, from 0 to T - 1.
        noise_level: "interpolate" log sigma between the levels, differentiably, or round to the "nearest".
    """

    table: Tensor
    log_table: Tensor

    def __init__(
        self,
        *,
        table: str | Sequence[float] | Tensor = "scaled_linear",
        noise_level: Literal["interpolate", "nearest"] = "interpolate",
    ) -> None:
        super().__init__()
        if noise_level not in ("interpolate", "nearest"):
            raise ValueError(f"noise_level {noise_level!r} is unknown: choose one of interpolate, nearest")
        self.noise_level = noise_level
        self.register_buffer("table", make_table(table), persistent=False)
        self.register_buffer("log_table", self.table.log(), persistent=False)
        self.register_buffer("index", torch.arange(len(self.table), dtype=torch.float64), persistent=False)

    def c_noise(self, sigma: Tensor) -> Tensor:
        assert isinstance(self.index, Tensor)
        if self.noise_level == "nearest":
            return (sigma[:, None] - self.table).abs().argmin(1).to(sigma.dtype)
        return interpolate(sigma.log(), self.log_table, self.index).clamp(0, len(self.table) - 1)


class VPrediction(EpsPrediction):
    """Networks of discrete time that predict `v = alpha eps - sigma x0` (Salimans and Ho 2022): Stable Diffusion 2."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma / (1 + sigma**2).sqrt()


class X0Prediction(EpsPrediction):
    """Networks of discrete time that predict the image itself."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.zeros_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class IDDPM(EpsPrediction):
    """Improved DDPM and ADM on the cosine schedule (Karras et al. 2022, Table 1).

    Args:
        c1, c2, steps: of the schedule, as in `noise_levels.iddpm_table`.
        noise_level: as in `EpsPrediction`; the published EDM code rounds to the "nearest".
    """

    def __init__(
        self,
        *,
        c1: float = 0.001,
        c2: float = 0.008,
        steps: int = 1000,
        noise_level: Literal["interpolate", "nearest"] = "interpolate",
    ) -> None:
        super().__init__(table=iddpm_table(c1=c1, c2=c2, steps=steps), noise_level=noise_level)


class RectifiedFlow(Preconditioning):
    """Rectified flow: the network predicts `n - x0` at `x_flow = (1 - t) x0 + t n` (Liu et al. 2023).

    With `x = x0 + sigma n`, `t = sigma / (1 + sigma)` and `x_flow = x / (1 + sigma)`.

    Args:
        time_scale: the network is given `time_scale * t`; Stable Diffusion 3 takes 1000.
    """

    def __init__(self, *, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.time_scale = time_scale

    def c_skip(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma / (1 + sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return self.time_scale * sigma / (1 + sigma)


class Denoised(Preconditioning):
    """Networks that are denoisers themselves: given x and sigma, they answer x0."""

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.zeros_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma


PRECONDITIONINGS: dict[str, Callable[..., Preconditioning]] = {
    "edm": EDM,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "eps": EpsPrediction,
    "v": VPrediction,
    "x0": X0Prediction,
    "flow": RectifiedFlow,
    "denoised": Denoised,
}


FLOW_END = 0.999
"""The largest time of flows: at 1, noise alone, sigma is infinite."""


def noise_ends(preconditioning: Preconditioning) -> tuple[float, float]:
    """The least and the greatest noise level that a network is taken to be trained on, where nothing else is said.

    Those of its table in discrete time, those of t = 0.001 and 0.999 of a flow, else 0.002 and 80 (Karras et al. 2022).
    """
    table = getattr(preconditioning, "table", None)
    if table is not None:
        return float(table[0]), float(table[-1])
    if isinstance(preconditioning, RectifiedFlow):
        end = FLOW_END / (1 - FLOW_END)
        return 1 / end, end
    return Denoiser.sigma_min, Denoiser.sigma_max


def make_preconditioning(name: str, **options: object) -> Preconditioning:
    """Build a preconditioning by name; `PRECONDITIONINGS` lists them.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an option that the preconditioning does not have.
    """
    return construct("preconditioning", name, PRECONDITIONINGS, **options)
