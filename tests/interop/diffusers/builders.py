"""Tiny real components of diffusers with random weights, built from configs."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def filled(module):
    """The module with larger random weights, so that no part of it is negligible."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return module.eval()


def component(kind, seed=0, **options):
    """A network of diffusers, always with the same random weights."""
    torch.manual_seed(seed)
    return getattr(diffusers, kind)(**options).eval()


def unet(seed=0, *, in_channels=4, w_channels=None, **changes):
    options = {
        "sample_size": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "time_cond_proj_dim": w_channels,
    }
    return component("UNet2DConditionModel", seed, **{**options, **changes})


def vae(channels=4, **changes):
    return component(
        "AutoencoderKL",
        1,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **changes,
    )


def tokenizer():
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=7)


def text_encoder(width=12, projection=None):
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def scheduler(kind="DDIMScheduler", **options):
    return getattr(diffusers, kind)(**{"num_train_timesteps": 1000, **SD_BETAS, **options})


def pipeline(kind="StableDiffusionPipeline", *, network=None, schedule=None):
    made = getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=network or unet(),
        scheduler=schedule or scheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def sdxl_unet(**changes):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    sizes = {"projection_class_embeddings_input_dim": 10 + 6 * 4, "cross_attention_dim": 22}
    return unet(**added, **sizes, **changes)


def sdxl_pipeline(schedule=None):
    made = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(12),
        text_encoder_2=text_encoder(10, projection=10),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl_unet(),
        scheduler=schedule or scheduler("EulerDiscreteScheduler"),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def unet_2d(**changes):
    options = {
        "sample_size": (8, 4),
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 4,
    }
    return component("UNet2DModel", **{**options, **changes})


def dit(*, num_embeds_ada_norm=5):
    return component(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=num_embeds_ada_norm,
        norm_num_groups=4,
    )


def sd3(*, in_channels=4, out_channels=4):
    return component(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=in_channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=out_channels,
        pos_embed_max_size=8,
    )


def flux(*, guidance_embeds=True, in_channels=16, out_channels=None):
    return component(
        "FluxTransformer2DModel",
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def words():
    """A tokenizer of letters for T5."""
    import tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def flux_pipeline():
    torch.manual_seed(6)
    t5 = transformers.T5Config(vocab_size=40, d_model=10, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoders = {"text_encoder": text_encoder(6), "text_encoder_2": transformers.T5EncoderModel(t5).eval()}
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        tokenizer=tokenizer(),
        tokenizer_2=words(),
        transformer=flux(),
        **encoders,
    )
    made.set_progress_bar_config(disable=True)
    return made


def sd3_pipeline():
    made = diffusers.StableDiffusion3Pipeline(
        transformer=sd3(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=text_encoder(4, projection=2),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(6, projection=4),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def pooled_text(count=3):
    generator = torch.Generator().manual_seed(5)
    text, pooled = torch.randn(count, 5, 10, generator=generator), torch.randn(count, 6, generator=generator)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def text_batch(count=3, length=7):
    generator = torch.Generator().manual_seed(5)
    return {"encoder_hidden_states": torch.randn(count, length, 12, generator=generator)}
