"""Damaged checkpoints end in the documented error: nothing is executed, and memory stays bounded."""

import io
import random
import resource
import struct
import sys

import pytest
import torch

from diffdistill.interop import ForeignFileError, Hints, read_foreign
from diffdistill.models import OpenAIUNet, SongUNet
from tests.interop.persistence import network, pickled, release
from tests.interop.test_adm import filled
from tests.interop.test_ldm import checkpoint

SMALL = {"model_channels": 32, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()}
EVENTS = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_seen = []
_watching = False


def _watch(event, args):
    if _watching and (event in EVENTS or (event == "open" and args[1] and any(c in str(args[1]) for c in "wax+"))):
        _seen.append((event, args))


sys.addaudithook(_watch)


def saved(content, *, archive):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def originals():
    """One small valid file of each kind."""
    song = {"model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [2], "dropout": 0.0}
    state = SongUNet(img_resolution=4, img_channels=1, label_dim=2, **song).state_dict()
    settings = {"img_resolution": 4, "img_channels": 1, "label_dim": 2, "embedding_type": "positional", **song}
    net = network(
        {"precond": "EDMPrecond", "model_type": "SongUNet", **settings},
        {f"model.{name}": value.numpy() for name, value in state.items()},
    )
    adm = filled(OpenAIUNet(img_resolution=8, img_channels=1, **SMALL))
    ldm = filled(OpenAIUNet(img_resolution=64, img_channels=1, **SMALL, adaptive_scale=False, resample="conv"))
    return {
        "x.pkl": pickled(release(net)),
        "x.pt": saved(adm.state_dict(), archive=False),
        "y.pt": saved(adm.state_dict(), archive=True),
        "x.ckpt": saved(checkpoint(ldm), archive=True),
    }


def damaged(data, rng):
    """The data with one kind of damage, mostly near its ends and names, where the structure is."""
    data = bytearray(data)
    size = len(data)

    def place():
        text = rng.choice((b"torch", b"_parameters", b"storage", b"model", b"PK", b"numpy", b"q", b"\x85", b"K"))
        found = data.find(text, rng.randrange(size)) if rng.random() < 0.7 else -1
        return min(size - 1, max(0, (rng.randrange(size) if found < 0 else found) + rng.randrange(-4, 24)))

    kind = rng.choice(("truncate", "flip", "flip", "size", "size", "insert", "delete", "repeat"))
    at = place()
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        for _ in range(rng.randrange(1, 9)):
            data[place()] ^= 1 << rng.randrange(8)
    elif kind == "size":
        number = rng.choice((0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
        width = rng.choice((1, 2, 4, 8))
        data[at : at + width] = struct.pack("<Q", number)[:width]
    elif kind == "insert":
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == "delete":
        del data[at : at + rng.randrange(1, 17)]
    else:
        data[at:at] = data[at : at + rng.randrange(1, 200)]
    return bytes(data)


def fuzz(folder, count):
    """Read `count` damaged files; how many were refused."""
    global _watching
    files = originals()
    hints = Hints(image_size=8)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        assert read_foreign(folder / name, hints if name.endswith(".pt") else None).denoiser is not None
    refused = multiline = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        rng = random.Random(i)
        name = sorted(files)[i % len(files)]
        (folder / name).write_bytes(damaged(files[name], rng))
        _watching = True
        try:
            read_foreign(folder / name, hints if name.endswith(".pt") else None)
        except ForeignFileError as error:
            multiline += "\n" in str(error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"input {i} ({name}) ended in {error!r}") from error
        finally:
            _watching = False
    assert not _seen and not multiline
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    return refused


def test_damaged_files_end_in_the_documented_error(tmp_path):
    assert fuzz(tmp_path, 240) > 120


@pytest.mark.slow
def test_ten_thousand_damaged_files_end_in_the_documented_error(tmp_path):
    assert fuzz(tmp_path, 10_000) > 5_000
