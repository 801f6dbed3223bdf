"""CLIP score: how well images fit their captions (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffdistill.metrics.features import to_bytes
from diffdistill.metrics.networks import load_pretrained, optional


class CLIPScore:
    """`100 max(cos(image, caption), 0)` of each pair, 100 being the factor that most tables use (the paper's is 2.5).

    Args:
        model: a name on the Hugging Face hub, or a folder.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the model is not there and cannot be fetched.
    """

    def __init__(self, *, model: str = "openai/clip-vit-base-patch16") -> None:
        transformers = optional("transformers", wanted_by="the CLIP score")
        self.name = model
        self._model = load_pretrained(transformers.CLIPModel, model)
        self._processor = load_pretrained(transformers.CLIPProcessor, model)

    @torch.no_grad()
    def __call__(self, x: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores `[B]` of images `[B, C, H, W]` in [-1, 1] and as many captions.

        Raises:
            ValueError: another number of captions than images.
        """
        if len(captions) != len(x):
            raise ValueError(f"expected one caption per image, {len(x)}, but got {len(captions)}")
        images = list(to_bytes(x).permute(0, 2, 3, 1).cpu().numpy())
        inputs: Any = self._processor(
            text=list(captions), images=images, return_tensors="pt", padding=True, truncation=True
        )
        answer = self._model.to(x.device)(**inputs.to(x.device))
        cosine = torch.nn.functional.cosine_similarity(answer.image_embeds, answer.text_embeds, dim=-1)
        return 100 * cosine.clamp(min=0)
