"""The exact denoiser of a mixture of isotropic Gaussians: a model with no error of its own, for tests and studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffdistill.denoiser import NULL_LABEL, Denoiser


class GaussianMixture(Denoiser):
    """Denoiser of data drawn from `sum_k weights[k] N(means[k], variances[k] I)`.

    With `p_k(x) ~ w_k N(x; m_k, (v_k + sigma^2) I)`,
    `D(x, sigma) = sum_k p_k(x) (v_k x + sigma^2 m_k) / (v_k + sigma^2)`.
    Computed in float64 whatever the dtype of `x`, which the result takes. Two products of `[B, D]` with `[D, K]` are
    the cost, and `[B, K]` the memory.

    Args:
        weights: `[K]`, positive; normalised to sum 1.
        means: `[K, ...]`.
        variances: `[K]`; 0 is a point, for which sigma must be positive.
        labels: class of each component, `[K]` integers from 0. Given a class, the denoiser is that of its components
            alone, so that classifier-free guidance on it is exact.

    Raises:
        ValueError: no component, shapes that do not agree, weights not positive, negative variances, a class without
            components.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    labels: Tensor

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor,
        variances: Tensor | Sequence[float],
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        weights, means, variances = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, variances))
        count = len(means)
        if not count:
            raise ValueError("a mixture needs at least one component")
        if weights.shape != (count,) or variances.shape != (count,):
            raise ValueError(
                f"{count} means need {count} weights and variances, "
                f"not {list(weights.shape)} and {list(variances.shape)}"
            )
        if not (weights > 0).all():
            raise ValueError(f"weights must be positive, but the least is {weights.min().item():g}")
        if not (variances >= 0).all():
            raise ValueError(f"variances must not be negative, but the least is {variances.min().item():g}")
        classes = torch.full((count,), NULL_LABEL) if labels is None else torch.as_tensor(labels, dtype=torch.long)
        if classes.shape != (count,):
            raise ValueError(f"{count} components need {count} labels, not {list(classes.shape)}")
        self.num_classes = 0 if labels is None else int(classes.max()) + 1
        if labels is not None and classes.unique().tolist() != list(range(self.num_classes)):
            raise ValueError(f"each class from 0 on needs a component, but the labels are {classes.tolist()}")
        weights = weights / weights.sum()
        self.data_shape = tuple(means.shape[1:])
        offsets = means.flatten(1) - weights @ means.flatten(1)
        self.sigma_data = float(((weights @ offsets.square()).mean() + weights @ variances).sqrt())
        self.register_buffer("log_weights", weights.log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("labels", classes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianMixture:
        # The components move to other devices, and stay in float64.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]`, given class labels `[B]` or None; -1 stands for no class."""
        if x.shape[1:] != self.data_shape:
            raise ValueError(f"this mixture is of data {list(self.data_shape)}, not {list(x.shape[1:])}")
        means = self.means.flatten(1)
        centre = means.mean(0)
        points, offsets = x.to(torch.float64).flatten(1) - centre, means - centre
        if sigma.shape != (len(x),):
            raise ValueError(f"expected one value per sample, shape [{len(x)}], but got shape {list(sigma.shape)}")
        noise = sigma.to(torch.float64)[:, None] ** 2
        variance = self.variances + noise
        # |x - m|^2 by one product: differences of all pairs would be [B, K, D]. Around the centre it keeps its digits.
        distance = points.square().sum(1, keepdim=True) - 2 * points @ offsets.mT + offsets.square().sum(1)
        log_p = self._log_weights(cond) - distance / (2 * variance) - variance.log() * (points.shape[1] / 2)
        p = log_p.softmax(1)
        kept = (p * self.variances / variance).sum(1, keepdim=True)
        denoised = centre + kept * points + (p * noise / variance) @ offsets
        return denoised.view(x.shape).to(x.dtype)

    def sample_data(self, n: int, *, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """Draw `n` samples in float64, `[n, ...]`, of the classes `cond: [n]`, or of all."""
        weights = self._log_weights(cond).exp().expand(n, -1)
        k = torch.multinomial(weights, 1, generator=generator)[:, 0]
        noise = torch.randn(n, *self.data_shape, dtype=torch.float64, device=self.means.device, generator=generator)
        scale = self.variances[k].sqrt().view(-1, *(1,) * len(self.data_shape))
        return self.means[k] + scale * noise

    def _log_weights(self, cond: Tensor | None) -> Tensor:
        """`[K]`, or `[B, K]` with minus infinity at the components of other classes."""
        if cond is None:
            return self.log_weights
        if self.num_classes == 0:
            raise ValueError("this mixture has no class labels: pass cond=None")
        excluded = (cond[:, None] != self.labels) & (cond[:, None] != NULL_LABEL)
        return self.log_weights.masked_fill(excluded, -torch.inf)
