"""The networks against the published implementation, and what every network must do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffdistill.models import DhariwalUNet, SongUNet, build_denoiser
from diffdistill.models.storage import load_state

REFERENCE = Path(__file__).parents[1] / "data" / "networks"
CONFIGS = json.loads((REFERENCE / "networks.json").read_text())
NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}
PRECONDITIONINGS = {
    "EDMPrecond": {"name": "edm"},
    "VPPrecond": {"name": "vp"},
    "VEPrecond": {"name": "ve"},
    "iDDPMPrecond": {"name": "iddpm", "noise_level": "nearest"},
}
SMALL = {
    "img_resolution": 8,
    "img_channels": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "dropout": 0.0,
}


def reference(name):
    """The denoiser, inputs and output of one reference file."""
    network = dict(CONFIGS[name])
    preconditioning = PRECONDITIONINGS[network.pop("precond")]
    network["name"] = NETWORKS[network.pop("model_type")]
    if preconditioning["name"] == "iddpm":
        network["out_channels"] = 2 * network["img_channels"]
    denoiser = build_denoiser(
        {
            "network": network,
            "preconditioning": preconditioning,
            "data_shape": [3, 8, 8],
            "num_classes": network["label_dim"],
            "sigma_min": 0.002,
            "sigma_max": 80.0,
        }
    ).eval()
    with np.load(REFERENCE / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/model.")}
    load_state(denoiser, state, source=name)
    labels = arrays["class_labels"].argmax(1) if "class_labels" in arrays else None
    return denoiser, arrays["x"], arrays["sigma"], labels, arrays["denoised"]


@pytest.mark.parametrize("name", CONFIGS)
def test_published_outputs(name):
    denoiser, x, sigma, labels, expected = reference(name)
    with torch.no_grad():
        out = denoiser(x, sigma, labels)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpmpp_edm_cond", "adm_iddpm_cond"])
def test_channels_last_float64_and_bf16_agree(name):
    denoiser, x, sigma, labels, expected = reference(name)
    with torch.no_grad():
        last = denoiser.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x, sigma, labels), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = last(x, sigma, labels)
        assert out.dtype == torch.float32
        assert (out - expected).norm() < 0.02 * expected.norm()
        # A half-precision network keeps the frequencies of its embeddings.
        half = last.bfloat16()
        assert half.model.map_noise.freqs.dtype == torch.float32
        assert (half(x, sigma, labels) - expected).norm() < 0.05 * expected.norm()
        double = reference(name)[0].double()
        out = double(x.double(), sigma, labels)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=1e-5)


def test_batch_equals_loop():
    denoiser, x, sigma, labels, _ = reference("adm_edm_cond")
    with torch.no_grad():
        whole = denoiser(x, sigma, labels)
        parts = [denoiser(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_the_null_label_is_a_zero_vector():
    denoiser, x, sigma, labels, _ = reference("ddpmpp_edm_cond")
    with torch.no_grad():
        null = denoiser(x, sigma, torch.full_like(labels, -1))
        torch.testing.assert_close(denoiser(x, sigma), null, rtol=0, atol=0)
        assert not torch.allclose(null, denoiser(x, sigma, labels))
        mixed = denoiser(x, sigma, torch.tensor([-1, 2, -1]))
    torch.testing.assert_close(mixed[0], null[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [SongUNet, DhariwalUNet])
def test_the_guidance_weight_has_no_effect_at_first(make):
    torch.manual_seed(0)
    net = make(**SMALL, attn_resolutions=[4], w_channels=12)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name != "map_w.weight":
                parameter.normal_(std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.randn(2)
    assert net.map_w.bias is None and not net.map_w.weight.any()
    first = net(x, t, w=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(first, net(x, t, w=torch.tensor([16.0, 7.0])), rtol=0, atol=0)
    first.square().sum().backward()
    assert net.map_w.weight.grad.abs().max() > 0
    nn.init.normal_(net.map_w.weight)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t), net(x, t, w=torch.zeros(2)), rtol=0, atol=0)
        assert (net(x, t, w=torch.tensor([0.0, 0.2])) - net(x, t)).flatten(1).norm(dim=1)[1] > 1e-3


@pytest.mark.parametrize("make", [SongUNet, DhariwalUNet])
def test_initial_scale(make):
    """The published distributions: zero where a residual branch ends, the stated spread elsewhere."""
    torch.manual_seed(0)
    net = make(**SMALL, attn_resolutions=[4], label_dim=5)
    block = net.enc["4x4_block0"]
    size = 9 * 16
    if make is SongUNet:
        bound, bias = (6 / (size + 2 * size)) ** 0.5, 0.0
        assert 0 < block.conv1.weight.abs().max() < 1e-5 * (6 / (4 * size)) ** 0.5
        assert abs(block.qkv.weight.abs().max() / (0.2 * 6 / (32 + 96)) ** 0.5 - 1) < 0.02
    else:
        bound = bias = (1 / 3 * 3 / net.enc["4x4_block0"].conv0.weight[0].numel()) ** 0.5
        assert not block.conv1.weight.any()
        assert abs(net.map_label.weight.std() - 1) < 0.15
    conv0 = net.enc["8x8_block0"].conv0 if make is SongUNet else block.conv0
    if make is SongUNet:
        bound = (6 / (2 * size)) ** 0.5
    assert abs(conv0.weight.abs().max() / bound - 1) < 0.02
    assert conv0.bias.abs().max() <= bias and bool(conv0.bias.any()) == bool(bias)


@pytest.mark.parametrize("make", [SongUNet, DhariwalUNet])
def test_bottleneck_is_the_last_block_of_the_encoder(make):
    net = make(**{**SMALL, "num_blocks": 2}, attn_resolutions=[])
    assert net.bottleneck is net.enc["4x4_block1"]


def test_the_bottleneck_of_the_cifar10_network():
    with torch.device("meta"):
        net = SongUNet(img_resolution=32, img_channels=3, channel_mult=[2, 2, 2], num_blocks=4, augment_dim=9)
    assert net.bottleneck is net.enc["8x8_block3"]
    # The number that EDM reports for its unconditional CIFAR-10 network.
    assert sum(p.numel() for p in net.parameters()) == 55_733_891


def test_skip_architectures_run_and_differentiate():
    torch.manual_seed(0)
    net = SongUNet(
        **{**SMALL, "img_resolution": 16, "channel_mult": [1, 2, 2]},
        attn_resolutions=[],
        encoder_type="skip",
        decoder_type="skip",
        resample_filter=[1, 3, 3, 1],
    )
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    out = net(x, torch.zeros(2))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_errors():
    with pytest.raises(ValueError, match="encoder_type 'unet' is unknown: choose one of standard, skip, residual"):
        SongUNet(**SMALL, encoder_type="unet")
    net = SongUNet(**SMALL)
    with pytest.raises(ValueError, match="takes no guidance weight"):
        net(torch.randn(1, 3, 8, 8), torch.zeros(1), w=torch.ones(1))
