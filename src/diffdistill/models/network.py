"""A network and its preconditioning, as a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Codec, Denoiser, Distilled, per_sample
from diffdistill.models.preconditioning import Preconditioning
from diffdistill.solvers.levels import level_dtype


class NetworkDenoiser(Denoiser):
    """`D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)` (Karras et al. 2022, Eq. 7).

    Args:
        network: called as `network(x, noise_labels, class_labels, w)`, with one-hot class labels or None, and with a
            fifth argument `ratio` where it has the attribute `s_channels` and that is not 0 (`step_ratio`). Where it
            has more output channels than the data, as networks that predict a variance do, the first ones count. A
            network with the attribute `conditional` is given the condition as it is, and defines `null_condition` and
            `check_condition` for it.
        preconditioning: the four coefficient functions.
        data_shape: shape of one sample, `(C, H, W)`.
        num_classes: number of class labels, 0 for none.
        sigma_min, sigma_max: the noise levels that the network was trained on.
        w_range: the guidance weights that the network was trained to take as an input, None if it takes none.
        distilled: how a few-step student is to be sampled.
        autoencoder: between images and the latents that are denoised, or None for a denoiser of images.

    Attributes:
        model: the network.
        config: what `build_denoiser` made this from, or None.

    Raises:
        ValueError: the network takes other class labels than `num_classes`, or takes w without `w_range`; an
            autoencoder of latents of another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        preconditioning: Preconditioning,
        *,
        data_shape: tuple[int, ...],
        num_classes: int = 0,
        sigma_min: float,
        sigma_max: float,
        w_range: tuple[float, float] | None = None,
        distilled: Distilled | None = None,
        autoencoder: Any = None,
    ) -> None:
        super().__init__()
        label_dim = getattr(network, "label_dim", num_classes)
        if label_dim != num_classes:
            raise ValueError(f"the network takes {label_dim} class labels, but num_classes is {num_classes}")
        if (w_range is not None) != bool(getattr(network, "w_channels", w_range)):
            raise ValueError(f"w_range {w_range}: a network with w_channels > 0 needs one, any other takes none")
        latents = tuple(getattr(autoencoder, "latent_shape", data_shape))
        if latents != tuple(data_shape):
            raise ValueError(f"the autoencoder makes latents {list(latents)}, but data_shape is {list(data_shape)}")
        self.model = network
        self.autoencoder = autoencoder
        self.preconditioning = preconditioning
        self.data_shape = tuple(data_shape)
        self.num_classes = num_classes
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = getattr(preconditioning, "sigma_data", Denoiser.sigma_data)
        self.w_range = None if w_range is None else (float(w_range[0]), float(w_range[1]))
        self.flow_map = bool(getattr(network, "s_channels", 0))
        self.distilled = distilled
        self.register_buffer("classes", torch.arange(num_classes), persistent=False)

    @property
    def bottleneck(self) -> nn.Module | None:
        return getattr(self.model, "bottleneck", None)

    @property
    def table(self) -> Tensor | None:
        return getattr(self.preconditioning, "table", None)

    @property
    def codec(self) -> Codec | None:
        return self.autoencoder

    @property
    def conditional(self) -> bool:
        return getattr(self.model, "conditional", super().conditional)

    def null_condition(self, cond: Any) -> Any:
        own = getattr(self.model, "null_condition", None)
        return super().null_condition(cond) if own is None else own(cond)

    def check_condition(self, cond: Any, batch: int) -> None:
        own = getattr(self.model, "check_condition", None)
        if own is None:
            super().check_condition(cond, batch)
        else:
            own(cond, batch)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's parameters, in which it computes; the result has that of `x`."""
        return next(self.model.parameters()).dtype

    def step_ratio(self, sigma: Tensor, s: Tensor) -> Tensor:
        """How a network is told that a step from `sigma` ends at `s`: their ratio in `[0, 1]`, 1 where s = sigma.

        It is one of angles, `atan(s / sigma_data) / atan(sigma / sigma_data)`, the times of TrigFlow (Lu and Song
        2024): the ratio of the levels themselves would not tell the ends of a step from noise apart.
        """
        scale = self.sigma_data
        return (s.to(torch.float64) / scale).atan() / (sigma / scale).atan()

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Any = None, w: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """Denoise.

        Args:
            x: `[B, C, H, W]`.
            sigma: standard deviation of the noise in `x`, `[B]`.
            cond: class labels, long `[B]`; -1, or None for the whole batch, stands for no class. Or the condition of
                a network that defines its own.
            w: guidance weight, `[B]`, for a network that takes one; None stands for w = 0.
            s: the level at which the step ends, `[B]` between 0 and sigma, for a flow map; None stands for s = sigma.

        Returns:
            The expected clean image, in the shape and dtype of `x`; of a flow map, what leads a step to s.

        Raises:
            ValueError: `sigma` does not have the shape `[B]`, or `w` or `s` is given to a network that takes none.
        """
        if w is not None and self.w_range is None:
            raise ValueError("this denoiser takes no guidance weight w: guide it with ClassifierFreeGuidance")
        if s is not None and not self.flow_map:
            raise ValueError("this denoiser takes no end of a step s: make a flow map with models.flow_map_student")
        coefficients, dtype = self.preconditioning, self.dtype
        sigma = sigma.to(level_dtype(sigma.device))
        x_in = (per_sample(coefficients.c_in(sigma), x) * x).to(dtype)
        noise_labels = coefficients.c_noise(sigma).to(torch.promote_types(dtype, torch.float32))
        given = cond if hasattr(self.model, "conditional") else self._one_hot(cond, len(x), dtype)
        ends = () if s is None else (self.step_ratio(sigma, s).to(noise_labels.dtype),)
        output = self.model(x_in, noise_labels, given, w, *ends)
        output = output[:, : x.shape[1]].to(x.dtype)
        return per_sample(coefficients.c_skip(sigma), x) * x + per_sample(coefficients.c_out(sigma), x) * output

    def _one_hot(self, cond: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        # A comparison rather than F.one_hot, which reads the labels on the host and refuses -1.
        if self.num_classes == 0:
            return None
        assert isinstance(self.classes, Tensor)
        if cond is None:
            return torch.zeros(batch, self.num_classes, dtype=dtype, device=self.classes.device)
        return (cond[:, None] == self.classes).to(dtype)
