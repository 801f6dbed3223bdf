"""ADM, its classifiers, consistency models and latent diffusion are recognised by their parameters."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import diffdistill
from diffdistill.interop import ForeignFileError, Hints, read_foreign
from diffdistill.interop.containers.tensors import Storage, TensorRecord
from diffdistill.interop.formats.adm import PUBLISHED
from diffdistill.interop.formats.unets import infer
from diffdistill.models import ClassifierGuidance, EncoderUNet, GaussianMixture, OpenAIUNet, guidance_student
from diffdistill.solvers.discrete_time import iddpm_table, linear_table

LDM = {"img_resolution": 64, "adaptive_scale": False, "resample": "conv"}
ADM = {"label_dim": 1000, "out_channels": 6}
# Options; then the number of parameters and a hash of all names and shapes, computed with the published code.
RELEASED = {
    "adm64": (
        {**ADM, "img_resolution": 64, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3},
        (295904454, "cdbf32c1675c84fb"),
    ),
    "adm128": ({**ADM, "img_resolution": 128, "channel_mult": (1, 1, 2, 3, 4)}, (421529606, "c56d52445fdb2112")),
    "adm256": ({**ADM, "img_resolution": 256}, (553838086, "e357403fc997eb00")),
    "adm512": (
        {**ADM, "img_resolution": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
        (558997638, "ab03f15f765591ce"),
    ),
    "cm_bedroom256": ({"img_resolution": 256, "adaptive_scale": False}, (526304771, "1e33a2e5e9d52765")),
    "ldm_bedroom": (
        {**LDM, "model_channels": 224, "channel_mult": (1, 2, 3, 4), "head_channels": 32},
        (274056163, "61c38f880cdb7ca3"),
    ),
    "ldm_church": (
        {
            **{"img_resolution": 32, "img_channels": 4, "model_channels": 192, "channel_mult": (1, 2, 2, 4, 4)},
            **{"attn_resolutions": (32, 16, 8, 4), "num_heads": 8},
        },
        (294966916, "0f3140e5e6a0062f"),
    ),
    "ldm_imagenet": (
        {**LDM, "model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_heads": 1, "context_dim": 512},
        (400920579, "7b0f2712566147ed"),
    ),
}
CLASSIFIERS = {
    "64": ({"img_resolution": 64, "channel_mult": (1, 2, 3, 4), "num_blocks": 4}, (65438568, "0b7fc9917ffd8325")),
    "128": ({"img_resolution": 128, "channel_mult": (1, 1, 2, 3, 4)}, (42568040, "e717337216e06448")),
    "256": ({"img_resolution": 256}, (54096360, "bc098f973cf9f8b9")),
    "512": ({"img_resolution": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)}, (54448360, "2a24b6c641814825")),
}


def signature(network):
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    text = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    return sum(p.numel() for p in network.parameters()), hashlib.sha256(text.encode()).hexdigest()[:16]


def records(state):
    return {
        name: TensorRecord(Storage(torch.float32, value.numel()), 0, tuple(value.shape), tuple(value.stride()))
        for name, value in state.items()
    }


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_the_released_networks_have_the_published_parameters_and_are_inferred(name):
    options, published = RELEASED[name]
    with torch.device("meta"):
        network = OpenAIUNet(**{"img_channels": 3, **options})
        assert signature(network) == published
        architecture = infer(records(network.state_dict()))
        hints = Hints(**{key: options[key] for key in ("num_heads", "head_channels") if key in options})
        hints = hints.over(PUBLISHED[architecture.channel_mult] if name[:2] in ("ad", "cm") else Hints())
        size = options["img_resolution"]
        assert name[:3] != "adm" or hints.image_size == size
        again = OpenAIUNet(
            img_resolution=size,
            img_channels=architecture.img_channels,
            out_channels=architecture.out_channels,
            label_dim=architecture.label_dim,
            **architecture.options(Hints(image_size=size).over(hints)),
        )
    assert signature(again) == published


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_the_released_classifiers_have_the_published_parameters_and_are_inferred(name):
    options, published = CLASSIFIERS[name]
    with torch.device("meta"):
        network = EncoderUNet(**options)
    assert signature(network) == published
    architecture = infer(records(network.state_dict()), decoder=False)
    assert architecture.channel_mult == tuple(options.get("channel_mult", (1, 1, 2, 2, 4, 4)))
    assert architecture.num_blocks == options.get("num_blocks", 2) and architecture.out_channels == 1000


def test_the_widths_of_a_published_model_alone_do_not_make_one(tmp_path):
    """ImageNet 64 of improved-diffusion has those of ADM, but strided convolutions, and another order of q, k and v."""
    options = {"img_resolution": 64, "img_channels": 3, "out_channels": 6, "model_channels": 32, "num_blocks": 1}
    network = OpenAIUNet(**options, channel_mult=(1, 2, 3, 4), num_heads=4, resample="conv", attn_resolutions=(8,))
    torch.save(network.state_dict(), tmp_path / "imagenet64_uncond_100M_1500K.pt")
    with pytest.raises(ForeignFileError, match="conv resampling: give image_size"):
        read_foreign(tmp_path / "imagenet64_uncond_100M_1500K.pt")


TINY = {"model_channels": 32, "channel_mult": (1, 2, 2), "num_blocks": 1, "head_channels": 16, "attn_resolutions": (4,)}


def filled(network):
    """All parameters drawn at random, also those that start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.1))
    return network.eval()


def reference_forward(s, x, t, y, *, order, scale_shift, resample):
    """ADM's U-Net once more, straight from its state dict `s`: functions only."""
    half = s["time_embed.0.weight"].shape[1] // 2
    phases = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    linear = lambda name, v: v @ s[f"{name}.weight"].T + s[f"{name}.bias"]  # noqa: E731
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", torch.cat([phases.cos(), phases.sin()], 1))))
    if y is not None:
        emb = emb + s["label_emb.weight"][y]
    norm = lambda name, v: F.group_norm(v, 32, s[f"{name}.weight"], s[f"{name}.bias"])  # noqa: E731

    def conv(name, v, **how):
        w = s[f"{name}.weight"]
        return F.conv2d(v, w, s[f"{name}.bias"], padding=w.shape[-1] // 2, **how)

    def res(name, v, change=lambda v: v):
        h = conv(f"{name}.in_layers.2", change(F.silu(norm(f"{name}.in_layers.0", v))))
        e = linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if scale_shift:
            a, b = e.chunk(2, 1)
            h = norm(f"{name}.out_layers.0", h) * (1 + a) + b
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        h = conv(f"{name}.out_layers.3", F.silu(h))
        skip = f"{name}.skip_connection"
        return h + (conv(skip, change(v)) if f"{skip}.weight" in s else change(v))

    def attention(name, v):
        b, c, height, width = v.shape
        flat = v.reshape(b, c, -1)
        qkv = s[f"{name}.qkv.weight"].reshape(3 * c, c) @ norm(f"{name}.norm", flat) + s[f"{name}.qkv.bias"][:, None]
        heads, out = c // 16, []
        for head in range(heads):
            if order == "heads_first":
                q, k, w = qkv[:, 48 * head : 48 * head + 48].split(16, 1)
            else:
                q, k, w = (qkv[:, i * c + 16 * head : i * c + 16 * head + 16] for i in range(3))
            weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / 4, -1)
            out.append(torch.einsum("bts,bcs->bct", weights, w))
        h = s[f"{name}.proj_out.weight"].reshape(c, c) @ torch.cat(out, 1) + s[f"{name}.proj_out.bias"][:, None]
        return (flat + h).reshape(v.shape)

    def repeat(v):
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def down(name, v):
        pooled = lambda v: F.avg_pool2d(v, 2)  # noqa: E731
        return conv(f"{name}.op", v, stride=2) if resample == "conv" else res(name, v, pooled)

    def up(name, v):
        return conv(f"{name}.conv", repeat(v)) if resample == "conv" else res(name, v, repeat)

    # Levels (1, 2, 2) with one block each and attention at the lowest.
    h = [conv("input_blocks.0.0", x)]
    h.append(res("input_blocks.1.0", h[-1]))
    h.append(down("input_blocks.2.0", h[-1]))
    h.append(res("input_blocks.3.0", h[-1]))
    h.append(down("input_blocks.4.0", h[-1]))
    h.append(attention("input_blocks.5.1", res("input_blocks.5.0", h[-1])))
    v = res("middle_block.2", attention("middle_block.1", res("middle_block.0", h[-1])))
    join = lambda v: torch.cat([v, h.pop()], 1)  # noqa: E731
    v = attention("output_blocks.0.1", res("output_blocks.0.0", join(v)))
    v = up("output_blocks.1.2", attention("output_blocks.1.1", res("output_blocks.1.0", join(v))))
    v = res("output_blocks.2.0", join(v))
    v = up("output_blocks.3.1", res("output_blocks.3.0", join(v)))
    v = res("output_blocks.5.0", join(res("output_blocks.4.0", join(v))))
    return conv("out.2", F.silu(norm("out.0", v)))


@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", ["residual", "conv"])
def test_the_network_equals_an_independent_forward_pass(order, scale_shift, resample):
    options = {"adaptive_scale": scale_shift, "attention_order": order, "resample": resample}
    network = filled(OpenAIUNet(img_resolution=16, img_channels=3, label_dim=5, **TINY, **options))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 517.5]), torch.tensor([4, 1])
    with torch.no_grad():
        expected = reference_forward(
            network.state_dict(), x, t, y, order=order, scale_shift=scale_shift, resample=resample
        )
        torch.testing.assert_close(network(x, t, F.one_hot(y, 5).float()), expected, rtol=1e-4, atol=1e-4)


def test_an_adm_file_becomes_a_denoiser_with_the_published_meaning(tmp_path):
    network = filled(OpenAIUNet(img_resolution=16, img_channels=3, out_channels=6, label_dim=5, **TINY))
    torch.save(network.state_dict(), tmp_path / "adm.pt")
    with pytest.raises(ForeignFileError, match="give image_size"):
        read_foreign(tmp_path / "adm.pt")
    found = read_foreign(tmp_path / "adm.pt", Hints(image_size=16, head_channels=16))
    denoiser = found.denoiser
    assert "never trained without labels" in found.description
    assert found.kind == "adm" and denoiser.num_classes == 5 and denoiser.bottleneck is denoiser.model.middle_block
    # At the levels of the table: x0 = x - sigma eps(x / sqrt(1 + sigma^2), step).
    steps, y = torch.tensor([0, 300, 999]), torch.tensor([4, 0, 1])
    sigma = linear_table()[steps]
    x = torch.randn(3, 3, 16, 16) * (1 + sigma.float()).view(-1, 1, 1, 1)
    with torch.no_grad():
        scaled = x / (1 + sigma.float() ** 2).sqrt().view(-1, 1, 1, 1)
        eps = network(scaled, steps.float(), F.one_hot(y, 5).float())[:, :3]
        expected = x - sigma.float().view(-1, 1, 1, 1) * eps
        torch.testing.assert_close(denoiser(x, sigma, y), expected, rtol=1e-3, atol=1e-3)
    cosine = read_foreign(tmp_path / "adm.pt", Hints(image_size=16, head_channels=16, noise_levels="iddpm")).denoiser
    assert cosine.sigma_max == pytest.approx(float(iddpm_table()[-1]))


def planar(state):
    """The attention's layers as convolutions over the plane, as in the code of consistency models."""
    return {
        name: value[..., None] if name.endswith((".qkv.weight", ".proj_out.weight")) else value
        for name, value in state.items()
    }


def test_consistency_models_and_their_teachers(tmp_path):
    options = {**TINY, "adaptive_scale": False, "attention_order": "qkv_first"}
    network = filled(OpenAIUNet(img_resolution=16, img_channels=3, **options))
    hints = {"image_size": 16, "head_channels": 16}
    for name in ("model.pt", "edited_cd.pt", "cd_bedroom.pt", "edm_bedroom.pt"):
        torch.save(planar(network.state_dict()), tmp_path / name)
    for name in ("model.pt", "edited_cd.pt"):
        with pytest.raises(ForeignFileError, match="family=consistency or family=edm"):
            read_foreign(tmp_path / name, Hints(**hints))
    student = read_foreign(tmp_path / "cd_bedroom.pt", Hints(**hints)).denoiser
    teacher = read_foreign(tmp_path / "edm_bedroom.pt", Hints(**hints)).denoiser
    named = read_foreign(tmp_path / "model.pt", Hints(**hints, family="consistency")).denoiser
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.002, 0.7, 80.0])
    s = sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        output = network(x / (s**2 + 0.25).sqrt(), 250 * sigma.log())
        expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * output
        torch.testing.assert_close(teacher(x, sigma), expected, rtol=1e-3, atol=1e-3)
        near = s - 0.002
        expected = 0.25 / (near**2 + 0.25) * x + 0.5 * near / (s**2 + 0.25).sqrt() * output
        torch.testing.assert_close(student(x, sigma), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(student(x, sigma)[0], x[0])  # the boundary condition
        assert torch.equal(student(x, sigma), named(x, sigma))
    assert student.distilled.sigmas == (80.0, 0.0) and teacher.distilled is None


def test_a_safetensors_file_is_read_as_a_pt_file_is(tmp_path):
    options = {"model_channels": 32, "channel_mult": (1, 1, 2, 2, 4, 4), "num_blocks": 1, "attn_resolutions": (32,)}
    state = filled(OpenAIUNet(img_resolution=256, img_channels=3, **options)).state_dict()
    save_file(state, tmp_path / "adm.safetensors")
    torch.save(state, tmp_path / "adm.pt")
    states = [diffdistill.load_denoiser(tmp_path / f"adm.{suffix}").state_dict() for suffix in ("safetensors", "pt")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_classifier_file(tmp_path):
    options = {"img_resolution": 16, "num_classes": 5, **TINY, "head_channels": 64, "channel_mult": (1, 2, 4)}
    network = filled(EncoderUNet(**options))
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    found = read_foreign(tmp_path / "classifier.pt")
    assert found.kind == "classifier" and found.denoiser is None
    x, steps = torch.randn(2, 3, 16, 16), torch.tensor([20, 700])
    sigma = linear_table()[steps]
    with torch.no_grad():
        logits = network(x / (1 + sigma.float() ** 2).sqrt().view(-1, 1, 1, 1), steps.float())
        torch.testing.assert_close(found.other(x, sigma), logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="classifier of 5 classes"):
        diffdistill.load_denoiser(tmp_path / "classifier.pt")


def test_classifier_guidance_turns_a_mixture_into_one_of_its_components():
    # log p(k | x) of a mixture is known exactly; guiding the whole by it with scale 1 gives the component.
    means, variances = torch.randn(3, 2, 5, 7).double(), torch.tensor([0.3, 0.7, 1.1]).double()
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    whole = GaussianMixture(weights=weights, means=means, variances=variances)

    def classifier(x, sigma):
        total = variances + sigma[:, None] ** 2
        distance = ((x[:, None] - means) ** 2).sum((2, 3, 4))
        return weights.log() - 0.5 * distance / total - 35 * total.log()

    classifier.num_classes = 3
    x, sigma, cond = torch.randn(4, 2, 5, 7).double(), torch.tensor([0.5, 1.0, 2.0, 1.0]).double(), [0, 1, 2, -1]
    guided = ClassifierGuidance(whole, classifier)
    result = guided(x, sigma, torch.tensor(cond))
    for i, k in enumerate(cond[:3]):
        one = GaussianMixture(weights=torch.ones(1).double(), means=means[k : k + 1], variances=variances[k : k + 1])
        torch.testing.assert_close(result[i], one(x, sigma, None)[i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result[3], whole(x, sigma, None)[3])
    # A guided denoiser can be differentiated in x and works where gradients are off.
    with torch.no_grad():
        torch.testing.assert_close(guided(x, sigma, torch.tensor(cond)), result)
    x.requires_grad_()
    assert torch.autograd.grad(guided(x, sigma, torch.tensor(cond)).sum(), x)[0].abs().max() > 0
    with pytest.raises(ValueError, match="class label 3"):
        guided.check_condition(torch.tensor([3, 0, 0, 0]), 4)


def test_an_upsampler_is_refused(tmp_path):
    network = OpenAIUNet(img_resolution=16, img_channels=6, out_channels=6, **TINY)
    torch.save(network.state_dict(), tmp_path / "upsampler.pt")
    with pytest.raises(ForeignFileError, match="upsamplers"):
        read_foreign(tmp_path / "upsampler.pt", Hints(image_size=16))


def test_a_missing_or_additional_parameter_is_refused(tmp_path):
    state = OpenAIUNet(img_resolution=16, img_channels=3, **TINY).state_dict()
    for change in ({"middle_block.0.in_layers.2.bias": None}, {"more": torch.ones(1)}):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(ForeignFileError, match="another architecture"):
            read_foreign(tmp_path / "x.pt", Hints(image_size=16))


def test_an_adm_model_can_become_a_guidance_student(tmp_path):
    torch.save(
        filled(OpenAIUNet(img_resolution=16, img_channels=3, label_dim=5, **TINY)).state_dict(), tmp_path / "adm.pt"
    )
    teacher = read_foreign(tmp_path / "adm.pt", Hints(image_size=16, head_channels=16)).denoiser
    student = guidance_student(teacher, (0.0, 4.0), w_channels=8).eval()
    x, sigma, y = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 1.0, 50.0]), torch.tensor([0, 3, -1])
    w = torch.tensor([0.0, 1.5, 4.0])
    with torch.no_grad():
        torch.testing.assert_close(student(x, sigma, y, w=w), teacher(x, sigma, y))
        student.model.map_w.weight.normal_()
        changed = student(x, sigma, y, w=w) - student(x, sigma, y, w=w + 0.5)
        assert changed.flatten(1).abs().amax(1).min() > 1e-4
