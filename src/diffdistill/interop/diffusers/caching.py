"""Images and captions to latents and text embeddings on disk, once, for training."""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.data.base import from_uint8
from diffdistill.data.finding import find_pictures, in_order
from diffdistill.data.folders import EXPECTED
from diffdistill.data.latents import DTYPES, write_index, write_shards
from diffdistill.data.pictures import PictureReader, is_picture
from diffdistill.files.contents import is_junk
from diffdistill.interop.diffusers.parts import Parts
from diffdistill.models.loading import fingerprint
from diffdistill.registry import choose
from diffdistill.reports.progress import progress


def captioned(source: str | os.PathLike[str]) -> Iterator[tuple[str, bytes, str]]:
    """Yield `(name, image file, caption)` in the order of names: `cat.jpg` goes with `cat.txt`.

    Args:
        source: a folder of images and captions, or a folder of `.tar` shards of such, as webdataset has them.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an image without a caption.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images and captions at {str(source)!r}")
    shards = [folder / name for name in in_order(path.name for path in folder.glob("*.tar") if not is_junk(path.name))]
    if shards:
        for shard in shards:
            yield from _of_tar(shard)
        return
    found = find_pictures(folder, classes=False)
    if not found.items:
        raise FileNotFoundError(f"no images in {str(source)!r}: {EXPECTED}, or .tar shards ({found})")
    for name, _ in found.items:
        path = folder / name
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"the image {path} has no caption: expected {caption.name} beside it")
        yield name, path.read_bytes(), _text(caption.read_bytes(), str(caption))


def _of_tar(shard: Path) -> Iterator[tuple[str, bytes, str]]:
    """The pairs of one shard, whose files of a sample lie beside each other."""
    pending: dict[str, dict[str, bytes]] = {}
    for name, content in _members(shard):
        stem, _, suffix = name.rpartition(".")
        kind = "image" if is_picture(name) else "caption" if suffix == "txt" and not is_junk(Path(name).name) else None
        if kind is None:
            continue
        parts = pending.setdefault(stem, {})
        parts[kind] = content
        if len(parts) == 2:
            yield stem, parts["image"], _text(parts["caption"], f"{stem}.txt in {shard}")
            del pending[stem]
    if pending:
        raise ValueError(f"{shard}: {next(iter(pending))} has no caption, or a caption without an image")


def _members(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a shard."""
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError):
        raise ValueError(f"the shard {shard} is no tar archive, or is truncated") from None


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption {name} is not UTF-8: {error}") from None


def cache_latents(
    parts: Parts,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    shard_size: int = 1024,
    dtype: str = "float16",
    seed: int = 0,
) -> Path:
    """Encode images and captions for training; a shard that is whole already is kept, so that a run can go on.

    A shard with an image or a caption that has changed since is made again.

    Args:
        parts: the pipeline whose autoencoder and text encoder to use.
        source: as in `captioned`.
        out: the folder to write to; `data.LatentData` reads it.
        batch_size: images encoded at once.
        shard_size: items of a file.
        dtype: of what is stored: float32, float16 or bfloat16.
        seed: of the draws from the autoencoder's posterior.

    Returns:
        `out`.

    Raises:
        FileNotFoundError, ValueError: as `captioned`; a file that cannot be read; a pipeline without autoencoder or
            text encoder; a folder that was made from another source, by another model or with other settings.
    """
    if parts.codec is None or parts.prompts is None:
        raise ValueError(f"{type(parts.pipeline).__name__} has no autoencoder and text encoder to make latents with")
    kind, out = choose("dtype", dtype, DTYPES), Path(out)
    resolution = parts.denoiser.data_shape[-1] * parts.codec.factor
    origin = {"model": _digest_of(parts), "resolution": resolution, "dtype": dtype}
    origin |= {"seed": seed, "shard_size": shard_size}

    def encoded(items: list[tuple[str, bytes, str]]) -> dict[str, Tensor]:
        pieces = [_encode(parts, items[i : i + batch_size], resolution, seed) for i in range(0, len(items), batch_size)]
        return {name: torch.cat([piece[name] for piece in pieces]).to(kind) for name in pieces[0]}

    images = progress(captioned(source), desc="encoding", unit="image")
    shards = write_shards(out, images, encoded, shard_size=shard_size, origin=origin, digest=_digest)
    if not shards:
        raise FileNotFoundError(f"no images with captions in the shards of {os.fspath(source)!r}")
    write_index(out, shards, parts.denoiser.data_shape, origin)
    return out


def _digest_of(parts: Parts) -> str:
    """A hash of the weights that make latents and embeddings."""
    digest = hashlib.sha256()
    for name in sorted(parts.pipeline.components):
        part = parts.pipeline.components[name]
        if isinstance(part, nn.Module) and (name == "vae" or name.startswith("text_encoder")):
            digest.update(f"{name} {fingerprint(part)}".encode())
    return digest.hexdigest()


def _digest(items: list[tuple[str, bytes, str]]) -> str:
    """A hash of names, image files and captions."""
    digest = hashlib.sha256()
    for name, content, caption in items:
        for part in (name.encode("utf-8", "surrogatepass"), content, caption.encode("utf-8", "surrogatepass")):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _encode(parts: Parts, items: list[tuple[str, bytes, str]], resolution: int, seed: int) -> dict[str, Tensor]:
    """Latents and embeddings of a batch, on the CPU."""
    assert parts.codec is not None and parts.prompts is not None
    device = next(parts.denoiser.parameters()).device
    reader = PictureReader(resolution, enlarge=True)
    images = from_uint8(np.stack([reader.read(content, name) for name, content, _ in items]))
    key = hashlib.blake2b(f"{seed} {items[0][0]}".encode("utf-8", "surrogatepass"), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little"))
    latents = parts.codec.encode(images.to(device), generator)
    cond = parts.prompts([caption for _, _, caption in items])
    return {"x": latents.cpu(), **{f"y.{name}": value.cpu().contiguous() for name, value in cond.items()}}
