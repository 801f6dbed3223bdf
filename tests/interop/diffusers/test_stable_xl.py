"""Stable Diffusion XL's own files: tiny ones with the real names, against the models that they were written from."""

import logging
import re

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as published
from safetensors.torch import save_file

from diffdistill import load_denoiser
from diffdistill.interop import ForeignFileError, Hints, read_foreign
from diffdistill.interop.diffusers import from_network, from_pipeline, load_pipeline
from diffdistill.models import guided
from tests.interop.diffusers.builders import component, diffusers, filled, scheduler, transformers
from tests.interop.diffusers.test_stable import (
    as_original,
    autoencoder,
    close,
    converted,
    original_names,
    text_config,
    tokenizer_folder,
    written,
)

POOLED, SIZES = 48, 8
HINTS = {"head_channels": 16, "image_size": 8}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = (
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("self_attn", "attn"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
)


def network(**changes):
    """A level without attention, then two of attention of different depth, as in the published U-Net (2 and 10)."""
    options = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 64 + 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZES,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZES,
    }
    return component("UNet2DConditionModel", 3, **{**options, **changes})


def first_encoder():
    return filled(transformers.CLIPTextModel(text_config(hidden_act="quick_gelu")))


def second_encoder():
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3, "projection_dim": POOLED}
    return filled(transformers.CLIPTextModelWithProjection(text_config(hidden_act="gelu", pad_token_id=0, **sizes)))


def unet_name(name, blocks=2):
    """What latent diffusion calls a parameter of `UNet2DConditionModel`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    side, first, *inner = stem.split(".")
    if side == "mid_block":
        place = f"middle_block.{1 if first == 'attentions' else 2 * int(inner[0])}"
        part, rest = first, inner[1:]
    else:
        level, part, index, rest = int(first), inner[0], int(inner[1]), inner[2:]
        start = level * (blocks + 1) + index
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * (blocks + 1)}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{level * (blocks + 1) + blocks}.2.conv.{kind}"
        layer = int(part == "attentions")
        place = f"input_blocks.{1 + start}.{layer}" if side == "down_blocks" else f"output_blocks.{start}.{layer}"
    return f"{place}.{RESIDUAL['.'.join(rest)] if part == 'resnets' else '.'.join(rest)}.{kind}"


def open_clip(encoder):
    """The state of OpenCLIP: one matrix for q, k and v, and a projection that multiplies from the right."""
    state, result = dict(encoder.state_dict()), {"logit_scale": torch.zeros(())}
    result["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            value = torch.cat([state[f"text_model.{name.replace('q_proj', f'{part}_proj')}"] for part in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        for new, old in OPEN_CLIP:
            name = name.replace(new, old)
        result[name] = value
    return result


def single_file(unet, vae=None, first=None, second=None):
    """The state dict of Stable Diffusion XL."""
    state = {f"model.diffusion_model.{unet_name(name)}": value for name, value in unet.state_dict().items()}
    if vae is not None:
        renamed = {original_names(name): value for name, value in vae.state_dict().items()}
        state |= {name: as_original(name, value) for name, value in renamed.items()}
    if first is not None:
        prefix = "conditioner.embedders.0.transformer.text_model."
        state |= {prefix + name.removeprefix("text_model."): value for name, value in first.state_dict().items()}
        state[f"{prefix}embeddings.position_ids"] = torch.arange(7)[None]
    if second is not None:
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(second).items()}
    return state


def saved(path, state):
    save_file({name: value.clone() for name, value in state.items()}, path)
    return path


def condition(count=3):
    generator = torch.Generator().manual_seed(8)
    return {
        "encoder_hidden_states": torch.randn(count, 7, 64 + 128, generator=generator),
        "text_embeds": torch.randn(count, POOLED, generator=generator),
        "time_ids": torch.tensor([64.0, 48, 0, 16, 64, 64]).expand(count, 6),
    }


def inputs():
    return torch.randn(3, 4, 8, 8), torch.tensor([0.3, 2.0, 11.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def parts():
    return {"unet": network(), "vae": autoencoder(), "first": first_encoder(), "second": second_encoder()}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_whole_file_equals_the_models_it_was_written_from(parts, suffix, tmp_path, caplog):
    path = (saved if suffix == ".safetensors" else written)(tmp_path / f"xl{suffix}", single_file(**parts))
    found = read_foreign(path, Hints(**HINTS))
    x, sigma = inputs()
    with torch.no_grad():
        for prediction in ("epsilon", "v_prediction"):
            reference = from_network(parts["unet"], scheduler(prediction_type=prediction))
            hints = Hints(**HINTS, prediction={"epsilon": None, "v_prediction": "v"}[prediction])
            denoiser = read_foreign(path, hints).denoiser
            close(denoiser(x, sigma, condition()), reference(x, sigma, condition()))
        for name, change in {"encoder_hidden_states": 0.5, "text_embeds": 0.5, "time_ids": 9.0}.items():
            changed = {**condition(), name: condition()[name] + change}  # so that each part is in what was compared
            assert (found.denoiser(x, sigma, changed) - found.denoiser(x, sigma, condition())).abs().max() > 1e-4
        tokens = torch.tensor([[52, 3, 4, 53, 0, 0, 0]])
        for name, reference in {"text_encoder": parts["first"], "text_encoder_2": parts["second"]}.items():
            actual = found.settings[name](tokens, output_hidden_states=True)
            expected = reference(tokens, output_hidden_states=True)
            close(actual.hidden_states[-2], expected.hidden_states[-2], 1e-6)
        close(actual.text_embeds, expected.text_embeds, 1e-6)
    torch.testing.assert_close(found.settings["vae"].state_dict(), parts["vae"].state_dict())
    assert found.settings["vae"].config.scaling_factor == 0.13025
    with caplog.at_level(logging.INFO, "diffdistill"):
        loaded = load_denoiser(path)
    assert loaded.data_shape == (4, 128, 128)
    for words in ("Stable Diffusion XL", "predicting eps", "autoencoder, text encoder and second text encoder"):
        assert words in caplog.text


def test_the_file_of_the_test_is_what_public_converters_read(parts):
    state, unet = single_file(**parts), parts["unet"]
    again = published.convert_ldm_unet_checkpoint(dict(state), {**unet.config})
    torch.testing.assert_close(again, dict(unet.state_dict()))
    prefix = "conditioner.embedders.1.model."
    text = published.convert_open_clip_checkpoint(parts["second"], dict(state), prefix=prefix)
    names = [name for name in parts["second"].state_dict() if ".self_attn.q" not in name]
    assert set(names) <= set(text)
    for name in names:
        if ".k_proj" not in name and ".v_proj" not in name:
            torch.testing.assert_close(text[name], parts["second"].state_dict()[name])


def test_the_empty_condition_is_zero_as_in_stock_pipelines(parts, tmp_path):
    state = single_file(parts["unet"], first=parts["first"], second=parts["second"])
    denoiser = read_foreign(saved(tmp_path / "xl.safetensors", state), Hints(**HINTS)).denoiser
    null = denoiser.null_condition(condition())
    assert not null["encoder_hidden_states"].any() and not null["text_embeds"].any()
    assert torch.equal(null["time_ids"], condition()["time_ids"])
    x, sigma = inputs()
    reference = from_network(parts["unet"], scheduler())
    with torch.no_grad():
        with_text, without = reference(x, sigma, condition()), reference(x, sigma, null)
        close(guided(denoiser, 2.0)(x, sigma, condition()), 3 * with_text - 2 * without, 1e-3)


def test_a_file_of_the_network_alone_has_the_published_sizes(tmp_path):
    """Without text encoders the published width of embedded sizes is taken; marks of later training are heeded."""
    unet = network(addition_time_embed_dim=256, projection_class_embeddings_input_dim=POOLED + 6 * 256)
    state = single_file(unet)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    x, sigma = inputs()
    for more, options in (
        ({}, {}),
        (marks, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ):
        found = read_foreign(saved(tmp_path / "unet.safetensors", {**state, **more}), Hints(**HINTS))
        reference = from_network(unet, scheduler(**options))
        assert found.denoiser.sigma_max == reference.sigma_max and "no other parts" in found.description
        with torch.no_grad():
            close(found.denoiser(x, sigma, condition()), reference(x, sigma, condition()))


def test_convert_writes_a_folder_of_the_stock_pipeline(parts, tmp_path):
    state = single_file(**parts)
    source, tokenizer = saved(tmp_path / "xl.safetensors", state), tokenizer_folder(tmp_path / "clip", first="!")
    hints = [f"hints.{name}={value}" for name, value in HINTS.items()]
    converted(f"source={source}", f"dest={tmp_path / 'folder'}", f"tokenizer={tokenizer}", *hints)
    loaded = load_pipeline(tmp_path / "folder")
    pipe = loaded.pipeline
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert pipe.tokenizer.pad_token_id == 53 and pipe.tokenizer_2.pad_token_id == 0
    stock = diffusers.StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["first"],
        text_encoder_2=parts["second"],
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        unet=parts["unet"],
        scheduler=scheduler(),
        add_watermarker=False,
    )
    expected = from_pipeline(stock)
    cond, reference = loaded.prompts(["a cat", "dog"]), expected.prompts(["a cat", "dog"])
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 9.0], dtype=torch.float64)
    with torch.no_grad():
        for name in ("encoder_hidden_states", "text_embeds"):
            close(cond[name], reference[name], 1e-6)
        close(loaded.denoiser(x, sigma, cond), expected.denoiser(x, sigma, {**reference, "time_ids": cond["time_ids"]}))
    saved(source, single_file(parts["unet"], first=parts["first"], second=parts["second"]))
    with pytest.raises(ValueError, match="with its autoencoder and text encoders"):
        converted(f"source={source}", f"dest={tmp_path / 'other'}", f"tokenizer={tokenizer}", *hints)


DAMAGE = {
    "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight": (torch.ones(383, 128), "q, k and v"),
    "conditioner.embedders.1.model.text_projection": (torch.ones(3), "text_projection"),
    "conditioner.embedders.1.model.transformer.resblocks.1.attn.strange": (torch.ones(3), "strange"),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (None, "missing.*final_layer_norm.bias"),
    "model.diffusion_model.label_emb.0.0.weight": (torch.ones(128, 40), "vector of 40 numbers"),
    "model.diffusion_model.label_emb.0.2.weight": (None, "missing.*add_embedding.linear_2"),
    "model.diffusion_model.input_blocks.5.1.transformer_blocks.2.norm1.bias": (torch.ones(64), "tensors unexpected"),
    "edm_mean": (torch.ones(4), "edm_mean"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_end_in_one_line(parts, name, tmp_path):
    state, (value, match) = single_file(**parts), DAMAGE[name]
    if value is None:
        del state[name]
    else:
        state[name] = value
    for path in (saved(tmp_path / "x.safetensors", state), written(tmp_path / "x.ckpt", state)):
        with pytest.raises(ForeignFileError, match=match) as error:
            read_foreign(path, Hints(**HINTS))
        assert "\n" not in str(error.value)


def test_the_refiner_is_refused_by_name(tmp_path):
    with pytest.raises(ForeignFileError, match="refiner of Stable Diffusion XL"):
        load_denoiser(saved(tmp_path / "refiner.safetensors", single_file(network(cross_attention_dim=1280))))
