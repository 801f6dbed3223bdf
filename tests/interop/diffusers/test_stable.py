"""Stable Diffusion's own files: tiny ones with the real names, against independent networks and converters."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as published
from safetensors.torch import save_file

from diffdistill import load_denoiser
from diffdistill.interop import ForeignFileError, Hints, read_foreign
from diffdistill.interop.diffusers import load_pipeline
from diffdistill.interop.formats.stable_folder import write_pipeline
from diffdistill.models import OpenAIUNet
from tests.interop.diffusers.builders import LETTERS, SD_BETAS, diffusers, transformers
from tests.interop.test_adm import filled

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import convert
from common.configs import compose

WIDTH = 64
HINTS = {"num_heads": 2, "image_size": 8}
BETAS = torch.linspace(SD_BETAS["beta_start"] ** 0.5, SD_BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2


def network(**changes):
    """The U-Net of latent diffusion, whose parameters have the published names; its context is set from outside."""
    options = {"img_resolution": 8, "img_channels": 4, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 2}
    style = {"attn_resolutions": (8,), "adaptive_scale": False, "resample": "conv", "num_heads": 2}
    return filled(OpenAIUNet(**{**options, **style, "context_dim": WIDTH, **changes}))


def autoencoder():
    torch.manual_seed(4)
    return filled(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=2,
            sample_size=16,
        )
    )


def original_names(name):
    """What latent diffusion calls a parameter of `AutoencoderKL`."""
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}", name)
    for new, old in (
        *((r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2")),
        *((r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"), (r"\.to_out\.0", ".proj_out")),
        *((r"mid_block\.attentions\.0", "mid.attn_1"), (r"\.to_([qkv])\.", r".\1."), (r"\.resnets\.", ".block.")),
        *((r"downsamplers\.0", "downsample"), (r"upsamplers\.0", "upsample")),
        *(("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")),
    ):
        name = re.sub(new, old, name)
    return f"first_stage_model.{name}"


def as_original(name, value):
    """Attention is made of convolutions there."""
    return value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value


def tokenizer_folder(folder, *, first="a"):
    """CLIP's layout: letters, then the two tokens around every text; the first letter may be another sign."""
    folder.mkdir(exist_ok=True)
    tokens = [first, *LETTERS[1:], *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def text_config(**changes):
    options = {"vocab_size": 54, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = {"num_attention_heads": 1, "max_position_embeddings": 7, "projection_dim": WIDTH}
    return transformers.CLIPTextConfig(**{**options, **tokens, **sizes, **changes})


def first_version(unet, vae, text, *, average=None):
    """The state dict of Stable Diffusion 1."""
    state = {"betas": BETAS.float(), "alphas_cumprod": torch.cumprod(1 - BETAS, 0).float()}
    state |= {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    if average is not None:
        names = {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in unet.state_dict()}
        state |= {names[name]: value for name, value in average.state_dict().items()}
    vae_state = {original_names(name): value for name, value in vae.state_dict().items()}
    state |= {name: as_original(name, value) for name, value in vae_state.items()}
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    prefix = "cond_stage_model.transformer.text_model."
    state |= {prefix + name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(7)[None]
    return state


def written(path, state):
    torch.save({"state_dict": state, "global_step": 7, "optimizer_states": [], "lr_schedulers": []}, path)
    return path


@pytest.fixture(scope="module")
def models():
    text = filled(transformers.CLIPTextModel(text_config()))
    return network(), autoencoder(), text


def answer(unet, x, sigma, context):
    """`x0` by the network of latent diffusion."""
    unet._context = lambda labels, batch: context
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    table = ((1 - alpha_bar) / alpha_bar).sqrt()
    steps = torch.tensor([int((table - level).abs().argmin()) for level in sigma])
    s = sigma.float().view(-1, 1, 1, 1)
    with torch.no_grad():
        return x - s * unet(x / (1 + s**2).sqrt(), steps.float())


def levels(*places):
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()[list(places)]


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_all_parts_of_version_one_equal_independent_ones(models, tmp_path):
    unet, vae, text = models
    average = network()
    average.load_state_dict({name: value * 0.9 for name, value in unet.state_dict().items()})
    x, sigma, context = torch.randn(3, 4, 8, 8), levels(0, 444, 999), torch.randn(3, 5, WIDTH)
    for given, expected in (({}, unet), ({"average": average}, average)):
        state = first_version(unet, vae, text, **given)
        found = read_foreign(written(tmp_path / "model.ckpt", state), Hints(**HINTS))
        assert found.kind == "stable-diffusion" and "predicting eps" in found.description
        assert "the autoencoder and text encoder" in found.description
        with torch.no_grad():
            close(found.denoiser(x, sigma, {"encoder_hidden_states": context}), answer(expected, x, sigma, context))
    # The published converter, on the same file, agrees on what the autoencoder's parameters are.
    again = diffusers.AutoencoderKL.from_config(vae.config)
    again.load_state_dict(published.convert_ldm_vae_checkpoint(dict(state), dict(vae.config)))
    torch.testing.assert_close(again.state_dict(), vae.state_dict())
    torch.testing.assert_close(found.settings["vae"].state_dict(), vae.state_dict())
    assert found.settings["vae"].config.scaling_factor == 0.18215
    # The empty prompt, of which the file holds no tokens: first, last, and padding, which is the last again.
    tokens = torch.tensor([[52, 53, 53, 53, 53, 53, 53]])
    with torch.no_grad():
        close(found.denoiser.model.null_encoder_hidden_states, text(tokens).last_hidden_state[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_in_any_precision_have_the_published_noise_levels(models, dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in first_version(*models).items()}
    found = read_foreign(written(tmp_path / "model.ckpt", state), Hints(**HINTS))
    assert found.settings["scheduler"].config.trained_betas is None
    assert found.denoiser.sigma_max == pytest.approx(float(levels(999)), rel=1e-6)
    state["betas"] = (BETAS * 1.02).to(dtype)
    found = read_foreign(written(tmp_path / "model.ckpt", state), Hints(**HINTS))
    assert found.denoiser.sigma_max > 1.02 * float(levels(999))


def test_version_two_has_linear_projections_another_text_encoder_and_needs_to_be_told(models, tmp_path):
    _, vae, text = models
    # Three levels of attention heads by width, as version 2 has, and matrices in place of convolutions.
    unet = network(num_heads=None, head_channels=16)
    state = first_version(unet, vae, text)
    for name, value in state.items():
        if re.search(r"\.proj_(in|out)\.weight", name) and "model.diffusion_model" in name:
            state[name] = value[:, :, 0, 0]
    for name in [name for name in state if name.startswith("cond_stage_model")]:
        del state[name]
    prefix, generator = "cond_stage_model.model.", torch.Generator().manual_seed(9)

    def add(name, *shape):
        state[f"{prefix}{name}"] = torch.randn(shape, generator=generator) * 0.3

    sizes = {"positional_embedding": (7, WIDTH), "text_projection": (WIDTH, WIDTH), "logit_scale": ()}
    for name, shape in {**sizes, "token_embedding.weight": (54, WIDTH), "attn_mask": (7, 7)}.items():
        add(name, *shape)
    for part in ("ln_final.weight", "ln_final.bias"):
        add(part, WIDTH)
    for i in range(3):
        block = f"transformer.resblocks.{i}."
        for name, shape in {
            **{f"{block}{norm}.{kind}": (WIDTH,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
            f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}attn.in_proj_bias": (3 * WIDTH,),
            f"{block}attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}attn.out_proj.bias": (WIDTH,),
            f"{block}mlp.c_fc.weight": (40, WIDTH),
            f"{block}mlp.c_fc.bias": (40,),
            f"{block}mlp.c_proj.weight": (WIDTH, 40),
            f"{block}mlp.c_proj.bias": (WIDTH,),
        }.items():
            add(name, *shape)
    path = written(tmp_path / "two.ckpt", state)
    found = read_foreign(path, Hints(head_channels=16, image_size=8, prediction="v"))
    x, sigma, context = torch.randn(3, 4, 8, 8), levels(0, 444, 999), torch.randn(3, 5, WIDTH)
    s = sigma.float().view(-1, 1, 1, 1)
    eps = (x - answer(unet, x, sigma, context)) / s
    with torch.no_grad():
        expected = x / (1 + s**2) - s / (1 + s**2).sqrt() * eps  # the same network's answer, read as v
        close(found.denoiser(x, sigma, {"encoder_hidden_states": context}), expected)
    # The published converter, for a text encoder of as many layers as Stable Diffusion 2 uses: all but the last.
    reference = transformers.CLIPTextModel(text_config(hidden_act="gelu", pad_token_id=0)).eval()
    converted = published.convert_open_clip_checkpoint(reference, dict(state), prefix=prefix)
    names = {name.removeprefix("text_model."): name for name in reference.state_dict()}
    converted = {
        names[name.removeprefix("text_model.")]: value
        for name, value in converted.items()
        if name.removeprefix("text_model.") in names
    }
    reference.load_state_dict(converted)
    with torch.no_grad():
        expected = reference(torch.tensor([[52, 53, 0, 0, 0, 0, 0]])).last_hidden_state[0]
    close(found.denoiser.model.null_encoder_hidden_states, expected)


def test_version_two_is_not_read_without_a_word_on_what_it_predicts(tmp_path):
    unet = network(context_dim=1024)
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    with pytest.raises(ForeignFileError, match=r"hints\.prediction=v"):
        load_denoiser(written(tmp_path / "two.ckpt", state))
    found = read_foreign(tmp_path / "two.ckpt", Hints(prediction="eps", num_heads=2))
    assert found.denoiser.data_shape == (4, 64, 64) and "no other parts" in found.description
    with pytest.raises(ValueError, match="empty prompt"):
        found.denoiser.null_condition({"encoder_hidden_states": torch.zeros(1, 7, 1024)})


def test_inpainting_models_take_a_mask(models, tmp_path):
    unet = network(img_channels=9, out_channels=4)
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    found = read_foreign(written(tmp_path / "inpaint.ckpt", state), Hints(**HINTS))
    assert found.denoiser.data_shape == (4, 8, 8) and "with a mask" in found.description
    cond = {"encoder_hidden_states": torch.randn(2, 5, WIDTH), "channels": torch.randn(2, 5, 8, 8)}
    with torch.no_grad():
        assert found.denoiser(torch.randn(2, 4, 8, 8), torch.ones(2), cond).shape == (2, 4, 8, 8)


def test_models_of_other_images_are_named_so_and_no_pipeline_of_text_is_written_around_them(models, tmp_path):
    """Instruct-Pix2Pix has an image beside the latents; unCLIP one beside the text, where XL has sizes."""
    found = read_foreign(
        written(tmp_path / "edit.ckpt", first_version(network(img_channels=8, out_channels=4), *models[1:])),
        Hints(**HINTS),
    )
    assert "latents with 4 further channels" in found.description
    with pytest.raises(ValueError, match="8 input channels"):
        write_pipeline(found, tokenizer_folder(tmp_path / "clip"), tmp_path / "folder")
    state = {f"model.diffusion_model.{name}": v for name, v in network(context_dim=1024).state_dict().items()}
    for i, width in ((0, 2048), (2, 128)):
        state[f"model.diffusion_model.label_emb.0.{i}.weight"] = torch.ones(128, width)
        state[f"model.diffusion_model.label_emb.0.{i}.bias"] = torch.ones(128)
    with pytest.raises(ForeignFileError, match="unCLIP"):
        read_foreign(written(tmp_path / "unclip.ckpt", state), Hints(**HINTS, prediction="v"))


def converted(*overrides):
    convert.convert(compose("convert", [str(override) for override in overrides]))


def test_convert_writes_a_file_or_with_a_tokenizer_a_whole_pipeline(models, tmp_path, capsys):
    source = written(tmp_path / "sd.ckpt", first_version(*models))
    hints = [f"hints.{name}={value}" for name, value in HINTS.items()]
    converted(f"source={source}", f"dest={tmp_path / 'file.safetensors'}", *hints)
    # The same model as one file of safetensors.
    save_file({n: v.clone() for n, v in first_version(*models).items()}, tmp_path / "single.safetensors")
    converted(f"source={tmp_path / 'single.safetensors'}", f"dest={tmp_path / 'again.safetensors'}", *hints)
    states = [load_denoiser(tmp_path / f"{name}.safetensors").state_dict() for name in ("file", "again")]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "Stable Diffusion, U-Net on 4x8x8 latents" in said and "left out" in said and "tokenizer=" in said
    tokenizer = tokenizer_folder(tmp_path / "clip")
    converted(f"source={source}", f"dest={tmp_path / 'folder'}", f"tokenizer={tokenizer}", *hints)
    found = read_foreign(source, Hints(**HINTS))
    parts = load_pipeline(tmp_path / "folder")
    assert type(parts.pipeline).__name__ == "StableDiffusionPipeline"
    x, sigma, cond = torch.randn(2, 4, 8, 8), levels(99, 900), parts.prompts(["a cat", ""])
    with torch.no_grad():
        expected = found.denoiser(x, sigma, cond)
        for loaded in (parts.denoiser, load_denoiser(tmp_path / "file.safetensors")):
            close(loaded(x, sigma, cond), expected)
            close(loaded(x, sigma), found.denoiser(x, sigma))
    close(cond["encoder_hidden_states"][1], found.denoiser.model.null_encoder_hidden_states)
    for wrong, match in ((tmp_path / "nowhere", "no tokenizer"), (tmp_path / "small", "tokens, but")):
        if wrong.name == "small":
            (tmp_path / "small").mkdir()
            (wrong / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
            (wrong / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(ValueError, match=match):
            converted(f"source={source}", f"dest={tmp_path / 'new'}", f"tokenizer={wrong}", *hints)
    with pytest.raises(ValueError, match="not empty"):
        converted(f"source={source}", f"dest={tmp_path / 'folder'}", f"tokenizer={tokenizer}", *hints)


def test_damaged_files_are_refused(models, tmp_path):
    state = first_version(*models)
    save_file({n: v.clone() for n, v in state.items()}, tmp_path / "x.safetensors")
    assert load_denoiser(tmp_path / "x.safetensors").data_shape == (4, 64, 64)
    content = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (content[:-100], content.replace(b'"F32"', b'"F64"', 1), content.replace(b"shape", b"shepa", 1)):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(ForeignFileError, match="safetensors|bytes"):
            read_foreign(tmp_path / "x.safetensors", Hints(**HINTS))
    for name, match in (
        ("model.diffusion_model.input_blocks.1.0.in_layers.9.weight", "in_layers.9"),
        ("first_stage_model.encoder.strange.weight", "encoder.strange"),
        ("model.diffusion_model.middle_block.3.in_layers.0.weight", "middle_block.3"),
    ):
        with pytest.raises(ForeignFileError, match=match):
            read_foreign(written(tmp_path / "x.ckpt", {**state, name: torch.ones(2)}), Hints(**HINTS))
    del state["first_stage_model.post_quant_conv.bias"]
    with pytest.raises(ForeignFileError, match="autoencoder.*missing"):
        read_foreign(written(tmp_path / "x.ckpt", state), Hints(**HINTS))


SAID = [
    ({"modelspec.prediction_type": "v"}, "v"),
    ({"modelspec.prediction_type": "epsilon"}, "eps"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
    ({"ss_v_parameterization": "True"}, "v"),
    ({"ss_v_parameterization": "False"}, "eps"),
    ({}, "eps"),
]


@pytest.mark.parametrize(("metadata", "prediction"), SAID)
def test_what_a_file_says_of_itself_is_heard(metadata, prediction, models, tmp_path):
    state = {name: value.clone().contiguous() for name, value in first_version(*models).items()}
    save_file(state, tmp_path / "model.safetensors", metadata)
    assert f"predicting {prediction};" in read_foreign(tmp_path / "model.safetensors", Hints(**HINTS)).description
    asked = read_foreign(tmp_path / "model.safetensors", Hints(**HINTS, prediction="eps"))
    assert "predicting eps;" in asked.description


def test_a_file_that_contradicts_itself_or_is_not_understood_is_refused(models, tmp_path):
    state = {name: value.clone().contiguous() for name, value in first_version(*models).items()}
    path = tmp_path / "model.safetensors"
    save_file({**state, "v_pred": torch.zeros(1)}, path, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ForeignFileError, match=r"contradicts itself .*v_pred.*: give hints.prediction"):
        read_foreign(path, Hints(**HINTS))
    assert "predicting v;" in read_foreign(path, Hints(**HINTS, prediction="v")).description
    save_file(state, path, {"modelspec.prediction_type": "rectified", "modelspec.resolution": "72x72"})
    with pytest.raises(ForeignFileError, match="'rectified' is unknown: give hints.prediction=eps or v"):
        read_foreign(path, Hints(num_heads=2))
    save_file(state, path, {"modelspec.resolution": "72x72", "ss_zero_terminal_snr": "True"})
    found = read_foreign(path, Hints(num_heads=2))
    assert found.denoiser.data_shape == (4, 9, 9) and found.settings["scheduler"].config.rescale_betas_zero_snr
