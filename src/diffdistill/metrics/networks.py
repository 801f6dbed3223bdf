"""Networks of other packages as feature extractors. The packages are imported when an extractor is built."""

from __future__ import annotations

import importlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.errors import one_line
from diffdistill.files.hashes import sha256
from diffdistill.metrics.features import Features, to_bytes
from diffdistill.models.loading import fingerprint


def optional(module: str, *, wanted_by: str) -> Any:
    """Import an optional module; an `ImportError` of one sentence names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f"{wanted_by} needs {package}: pip install 'diffdistill[eval]' ({error})") from None


class Inception(Features):
    """Inception-v3 of the original FID (the TensorFlow graph of 2015-12-05), as torch-fidelity ports it.

    2048 features of the last pooling layer, with the resizing of TensorFlow 1, and logits without bias for the
    Inception score. Images become bytes first, as they would in files.

    Args:
        path: the weights; None takes the file that torch-fidelity caches, which it fetches on first use.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: no such file, or it cannot be fetched.
    """

    name = "inception"

    def __init__(self, *, path: str | os.PathLike[str] | None = None) -> None:
        port = optional("torch_fidelity.feature_extractor_inceptionv3", wanted_by="the feature extractor inception")
        url = port.URL_INCEPTION_V3
        self.path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2] if path is None else Path(path)
        if path is not None and not self.path.is_file():
            raise FileNotFoundError(f"no Inception weights at {str(path)!r}: get them from {url}")
        if not self.path.is_file():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(self.path), hash_prefix="6726825d", progress=False)
            except (URLError, OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"the Inception weights cannot be fetched ({error}): put {url} at {self.path}"
                ) from None
        torch.load(self.path, weights_only=True)  # torch-fidelity would unpickle anything: this refuses code
        self._model = port.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.path)
        )

    @cached_property
    def _sha256(self) -> str:
        return sha256(self.path)

    @property
    def weights(self) -> str | None:
        return self._sha256

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self._model.to(x.device)(to_bytes(x))
        return features, logits


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(Features):
    """The class token of DINOv2 ViT-L/14, 1024 features, as FD_DINOv2 takes it (Stein et al. 2023; EDM2).

    Images become bytes, are resized to 224x224 (bicubic, antialiased) and normalised as ImageNet's.

    Args:
        model: a name on the Hugging Face hub, or a folder.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the model is not there and cannot be fetched.
    """

    name = "dinov2"

    def __init__(self, *, model: str = "facebook/dinov2-large") -> None:
        transformers = optional("transformers", wanted_by="the feature extractor dinov2")
        self._model = load_pretrained(transformers.Dinov2Model, model)

    @property
    def weights(self) -> str | None:
        return fingerprint(self._model)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.token(to_bytes(x).float()), None

    def token(self, x: Tensor) -> Tensor:
        """The class token `[B, 1024]` of images `[B, 3, H, W]` with values from 0 to 255."""
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False) / 255
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return self._model.to(x.device)(pixel_values=(x - mean) / std).pooler_output


def load_pretrained(kind: Any, name: str) -> Any:
    """`kind.from_pretrained(name)`, frozen where it is a module, with an error of one line.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched.
    """
    try:
        loaded = kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{kind.__name__} {name!r} is not there and cannot be fetched: {one_line(error)}"
        ) from None
    return loaded.eval().requires_grad_(False) if isinstance(loaded, torch.nn.Module) else loaded
