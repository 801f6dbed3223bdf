"""Latent diffusion: the U-Net in a checkpoint, with its moving average, its noise levels and its classes."""

import argparse
import sys

import pytest
import torch
import torch.nn.functional as F

from diffdistill.interop import ForeignFileError, read_foreign
from diffdistill.interop.containers.records import UnsafePickleError
from diffdistill.models import OpenAIUNet, guidance_student, guided
from tests.interop.test_adm import TINY, filled

OPTIONS = {**TINY, "adaptive_scale": False, "resample": "conv", "head_channels": 32}
BETAS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2


def checkpoint(network, *, averaged=None, classes=None):
    state = {"betas": BETAS.float(), "scale_factor": torch.tensor(0.25), "first_stage_model.w": torch.ones(2, 3)}
    for name, value in network.state_dict().items():
        if name == "context_emb.weight":
            continue
        state[f"model.diffusion_model.{name}"] = value
        if averaged is not None:
            state[f"model_ema.diffusion_model{name.replace('.', '')}"] = averaged.state_dict()[name]
    if classes is not None:
        state["cond_stage_model.embedding.weight"] = classes
    return {"state_dict": state, "global_step": 3, "optimizer_states": [], "epoch": 1}


def test_the_unconditional_network_with_its_average(tmp_path):
    x, steps = torch.randn(2, 3, 64, 64), torch.tensor([0, 640])
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()[steps]
    s = sigma.float().view(-1, 1, 1, 1)
    options = {**OPTIONS, "attn_resolutions": (16,)}
    last = filled(OpenAIUNet(img_resolution=64, img_channels=3, **options))
    average = OpenAIUNet(img_resolution=64, img_channels=3, **options).eval()
    average.load_state_dict({name: value * 0.9 for name, value in last.state_dict().items()})
    for model, expected in (({}, last), ({"averaged": average}, average)):
        content = checkpoint(last, **model)
        # Merged and pruned files often hold the state dict alone.
        torch.save(content if model else content["state_dict"], tmp_path / "model.ckpt")
        found = read_foreign(tmp_path / "model.ckpt")
        assert found.denoiser.latents
        assert found.kind == "ldm" and found.settings["scale_factor"] == 0.25
        with torch.no_grad():
            result = x - s * expected(x / (1 + s**2).sqrt(), steps.float())
            torch.testing.assert_close(found.denoiser(x, sigma), result, rtol=1e-3, atol=1e-3)


def test_the_class_conditional_network(tmp_path):
    options = {**OPTIONS, "num_heads": 1, "context_dim": 24, "attn_resolutions": (16,)}
    network = filled(OpenAIUNet(img_resolution=64, img_channels=3, label_dim=5, **options))
    classes = network.state_dict()["context_emb.weight"]
    torch.save(checkpoint(network, classes=classes), tmp_path / "cin.ckpt")
    denoiser = read_foreign(tmp_path / "cin.ckpt").denoiser
    assert denoiser.num_classes == 5 and guided(denoiser, 1.0).latents and guidance_student(denoiser, (0, 4)).latents
    x, sigma, labels = torch.randn(3, 3, 64, 64), torch.full((3,), 0.9), torch.tensor([4, 0, -1])
    with torch.no_grad():
        result = denoiser(x, sigma, labels)
        # Labels enter as the context: the rows of the table, the last of which stands for none.
        changed = network.state_dict()
        changed["context_emb.weight"] = classes[[4, 1, 2, 3, 4, 5]]
        network.load_state_dict(changed)
        torch.save(checkpoint(network, classes=changed["context_emb.weight"]), tmp_path / "cin.ckpt")
        other = read_foreign(tmp_path / "cin.ckpt").denoiser(x, sigma, torch.tensor([0, 0, -1]))
        torch.testing.assert_close(other[0], result[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[2], result[2], rtol=1e-4, atol=1e-5)
        assert (other[1] - result[1]).abs().max() > 1e-3
        torch.testing.assert_close(denoiser(x, sigma)[2], result[2], rtol=1e-4, atol=1e-5)


def test_cross_attention_equals_an_independent_one():
    from diffdistill.models.transformer import CrossAttention

    torch.manual_seed(0)
    layer = CrossAttention(12, 5, 3)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 4, 5)
    q, k, v = x @ layer.to_q.weight.T, context @ layer.to_k.weight.T, context @ layer.to_v.weight.T
    heads = [
        torch.softmax(q[..., i : i + 4] @ k[..., i : i + 4].transpose(1, 2) / 2, -1) @ v[..., i : i + 4]
        for i in (0, 4, 8)
    ]
    torch.testing.assert_close(layer(x, context), F.linear(torch.cat(heads, -1), *layer.to_out[0].parameters()))


def test_a_text_conditional_model_names_the_extra_that_it_needs(tmp_path, monkeypatch):
    network = OpenAIUNet(img_resolution=64, img_channels=3, label_dim=5, **OPTIONS, context_dim=24)
    torch.save(checkpoint(network), tmp_path / "sd.ckpt")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"diffdistill\[diffusers\]"):
        read_foreign(tmp_path / "sd.ckpt")


def test_a_foreign_object_beside_the_weights_is_refused_by_name(tmp_path):
    network = OpenAIUNet(img_resolution=64, img_channels=3, **OPTIONS)
    torch.save({**checkpoint(network), "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafePickleError, match=r"argparse\.Namespace"):
        read_foreign(tmp_path / "x.ckpt")


def test_damaged_betas_are_refused(tmp_path):
    content = checkpoint(OpenAIUNet(img_resolution=64, img_channels=3, **OPTIONS))
    content["state_dict"]["betas"] = BETAS.float() - 1
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ForeignFileError, match="between 0 and 1"):
        read_foreign(tmp_path / "x.ckpt")
