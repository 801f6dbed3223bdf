"""Small real models for the tests; sizes differ pairwise, so that a wrong broadcast cannot pass."""

import torch

from diffdistill.models import build_denoiser


def tiny_denoiser(seed=0, **changes):
    """A small DDPM++ denoiser with 4 classes on [2, 8, 8]; its zero-initialised layers are filled."""
    torch.manual_seed(seed)
    config = {
        "network": {
            "name": "song_unet",
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
            "dropout": 0.0,
        },
        "preconditioning": {"name": "edm", "sigma_data": 0.5},
        "data_shape": [2, 8, 8],
        "num_classes": 4,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
    }
    denoiser = build_denoiser({**config, **changes})
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1)
    return denoiser


def tiny_batch(denoiser, batch=3):
    return {"x": torch.randn(batch, *denoiser.data_shape), "y": torch.arange(batch) % denoiser.num_classes}
