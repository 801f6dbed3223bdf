"""Extractors that are trained with: the published distance, and gradients that reach the image."""

import pytest
import torch

from diffdistill.learned.perceptual import DIFFERENTIABLE, feature_distance
from diffdistill.metrics.differentiable import LPIPS, SmoothDINOv2
from diffdistill.metrics.networks import DINOv2
from diffdistill.models import GaussianMixture


@pytest.mark.parametrize("channels", [1, 3])
def test_the_squared_distance_of_features_is_lpips(channels):
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    features = LPIPS(net="alex", size=None, pretrained=False)
    for head in features.model.lins:
        head.model[-1].weight.abs_()  # as the published ones are
    x, y = (torch.rand(2, channels, 40, 36, requires_grad=True) * 2 - 1 for _ in range(2))
    ours = (features(x) - features(y)).square().sum(1)
    theirs = features.model(*(v.expand(-1, 3, -1, -1) for v in (x, y)))[:, 0, 0, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert package.LPIPS is type(features.model)
    (slope,) = torch.autograd.grad(ours.sum(), x)
    assert slope.abs().sum() > 0


def tiny_dinov2(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, patch_size=56)
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def test_dinov2_without_bytes_is_close_to_dinov2_and_has_a_gradient(tmp_path):
    model = tiny_dinov2(tmp_path)
    x = (torch.rand(2, 1, 9, 7) * 2 - 1).requires_grad_()
    smooth = SmoothDINOv2(model=model)(x)
    rounded = DINOv2(model=model)(x)
    assert not rounded.requires_grad
    torch.testing.assert_close(smooth, rounded, rtol=0.05, atol=0.05)
    (slope,) = torch.autograd.grad(smooth[:, 0].sum(), x)
    assert slope.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize(("name", "shape"), [("digits_classifier", (1, 8, 8)), ("emoji_classifier", (3, 16, 16))])
def test_classifiers_have_a_gradient(name, shape):
    model = GaussianMixture([1.0], torch.zeros(1, *shape), [0.3])
    try:
        distance = feature_distance(model, name=name, weight=0.3)
    except FileNotFoundError:
        pytest.skip(f"the classifier of {name} is not shipped")
    x = (0.5 * torch.randn(2, *shape)).requires_grad_()
    ours, wanted = distance.pair(x, torch.zeros(2, *shape))
    assert distance.weight == 0.3 and not wanted.requires_grad
    (slope,) = torch.autograd.grad(ours.square().sum(), x)
    assert slope.flatten(1).norm(dim=1).min() > 0


class Doubled(GaussianMixture):
    """A mixture of latents, whose images are twice as bright."""

    @property
    def codec(self):
        return self

    def decode(self, x):
        return 2 * x


def test_latents_are_decoded_first():
    model = Doubled([1.0], torch.zeros(1, 3, 16, 16), [0.3])
    x = torch.randn(2, 3, 16, 16)
    ours, _ = feature_distance(model, name="pixels_8x8").pair(x, x)
    torch.testing.assert_close(ours, torch.nn.functional.avg_pool2d(2 * x, 2).flatten(1))
    with pytest.raises(ValueError, match=", ".join(sorted(DIFFERENTIABLE))):
        feature_distance(model, name="clip")
