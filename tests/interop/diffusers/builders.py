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


def unet(seed=0, *, in_channels=4, w_channels=None, **changes):
    torch.manual_seed(seed)
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
    return diffusers.UNet2DConditionModel(**{**options, **changes}).eval()


def vae(channels=4):
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


def tokenizer():
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)


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


def text_batch(count=3, length=7):
    generator = torch.Generator().manual_seed(5)
    return {"encoder_hidden_states": torch.randn(count, length, 12, generator=generator)}
