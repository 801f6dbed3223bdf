"""The objective that trains an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdistill.models.autoencoder import Autoencoder
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.randomness import normal_like


class Reconstruction(Objective):
    """`|| decoder(z + s n) - x ||^2 + beta || z ||^2` with `z = encoder(x)`, each a mean over its elements.

    This is a variational autoencoder (Kingma and Welling 2014) whose posterior has the fixed standard deviation s:
    the second term is its divergence from a standard normal prior, up to constants. The noise makes near latents mean
    near images, which is what a diffusion model of them needs.

    Args:
        autoencoder: the model to train.
        noise: s.
        prior: beta.
    """

    def __init__(self, autoencoder: Autoencoder, *, noise: float = 0.05, prior: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("noise", noise), ("prior", prior)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        self.trained = autoencoder
        self.noise, self.prior = noise, prior

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile the encoder and the decoder, which are called one by one."""
        for module in self.trained.children():
            module.compile(backend=backend)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Loss:
        """`batch` holds images `x` `[B, C, H, W]`."""
        x, autoencoder = batch["x"], self.trained
        assert isinstance(autoencoder, Autoencoder)
        z = autoencoder.encoder(x)
        error = (autoencoder.decoder(z + self.noise * normal_like(z, generator)) - x).square().mean()
        psnr = 10 * torch.log10(4 / error.detach())
        return Loss(error + self.prior * z.square().mean(), {"psnr": psnr})
