"""Streaming, splits and processes; references and sources of every kind; parity with torch-fidelity."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import TensorData, load_data
from diffdistill.metrics import make_features
from diffdistill.metrics.collect import Collected, Keep, collect, shard
from diffdistill.metrics.evaluate import EvaluationOptions, describe, evaluate
from diffdistill.metrics.features import Features, to_bytes
from diffdistill.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from diffdistill.metrics.measures import MEASURES, measure, needed
from diffdistill.metrics.reference import Reference, load_reference, reference_of, save_reference
from diffdistill.metrics.sources import Sampler, StoredImages, open_images
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import Samples, save_pngs
from tests.builders import tiny_denoiser

ROOT = Path(__file__).resolve().parents[2]
PIXELS = make_features("pixels")


def images(count=61, seed=0):
    x = torch.rand(count, 2, 3, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return TensorData(x, torch.arange(count) % 7, num_classes=7)


@pytest.mark.parametrize("batch_size", [61, 1, 8])
def test_streaming_in_parts_equals_one_pass(batch_size):
    data, source = images(), StoredImages(images())
    source.mixed = True
    got = collect(source, PIXELS, splits=3, keep=Keep(features=True), batch_size=batch_size)
    x = data.x.flatten(1).double()
    assert [part.count for part in got.parts] == [21, 20, 20] and len(got) == 61
    torch.testing.assert_close(got.statistics.covariance, x.T.cov(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.parts[1].mean, x[21:41].mean(0), rtol=1e-12, atol=0)
    assert torch.equal(got.features.double(), x) and torch.equal(got.labels, data.y)
    assert torch.equal(got.part(2).features, got.features[41:]) and got.part(2).parts[0].count == 20


def test_parts_of_stored_images_are_alike_even_where_they_are_sorted():
    data = images(60)
    order = data.x.flatten(1).mean(1).argsort()
    data = TensorData(data.x[order], torch.arange(60) // 6, num_classes=10)
    got = collect(StoredImages(data), PIXELS, splits=3, keep=Keep(features=True), batch_size=7)
    parts = [got.part(k) for k in range(3)]
    assert [len(part.labels) for part in parts] == [part.count for part in got.parts] == [20, 20, 20]
    assert sorted(label for part in parts for label in part.labels.tolist()) == data.y.tolist()
    for part in parts:
        assert len(part.labels.unique()) > 6
        torch.testing.assert_close(part.statistics.mean, part.features.double().mean(0), rtol=1e-6, atol=1e-7)


def test_shards_cover_everything_once(monkeypatch):
    for world in (1, 3, 4):
        monkeypatch.setattr("diffdistill.distributed.world_size", lambda world=world: world)
        covered = []
        for rank in range(world):
            monkeypatch.setattr("diffdistill.distributed.rank", lambda rank=rank: rank)
            covered += shard(10)
        assert covered == list(range(10))


WORKER = """
import json, os, sys, torch
rank, world, port, out = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
sys.path.insert(0, {root!r})
from diffdistill.metrics.collect import Keep, collect
from diffdistill.metrics.sources import Sampler
from diffdistill.distributed import processes
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import Samples, save_pngs
from tests.builders import tiny_denoiser
from tests.metrics.test_collect import PIXELS
with processes():
    sampler = Sampler(plan(tiny_denoiser(), num_steps=2), 13, seed=5)
    got = collect(sampler, PIXELS, splits=2, keep=Keep(features=True), batch_size=4)
whole = got.statistics
torch.save([got.features, got.labels, whole.mean, whole.covariance, torch.tensor([len(got)])], out)
"""


def test_two_processes_equal_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(root=str(ROOT)), str(r), "2", port, str(outs[r])], env=environment
        )
        for r in range(2)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    sampler = Sampler(plan(tiny_denoiser(), num_steps=2), 13, seed=5)
    one = collect(sampler, PIXELS, splits=2, keep=Keep(features=True), batch_size=4)
    expected = [one.features, one.labels, one.statistics.mean, one.statistics.covariance, torch.tensor([13])]
    for out in outs:
        for a, b in zip(torch.load(out), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sources_of_every_kind_hold_the_same_images(tmp_path):
    digits = load_data("digits", split="test")
    x, y = digits.x[:12], digits.y[:12]
    levels = to_bytes(x)[:, 0].numpy()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, image in enumerate(levels):
            (tmp_path / "folder").mkdir(exist_ok=True)
            path = tmp_path / "folder" / f"{i:03d}.png"
            Image.fromarray(image).save(path)
            archive.write(path, f"00000/{i:03d}.png")
        labels = [[f"00000/{i:03d}.png", int(label)] for i, label in enumerate(y)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    np.savez(tmp_path / "ours.npz", x=x.numpy(), y=y.numpy())
    np.savez(tmp_path / "adm.npz", levels[..., None], y.numpy())
    for name in ("folder", "set.zip", "ours.npz", "adm.npz"):
        source = StoredImages(open_images(tmp_path / name), limit=11)
        (got, labels), (rest, _) = source.batches(range(11), 7, torch.device("cpu"))
        assert source.shape == (1, 8, 8) and len(got) == 7 and len(rest) == 4
        torch.testing.assert_close(torch.cat([got, rest]), x[:11], rtol=0, atol=0.5 / 127)
        assert (labels is None) == (name == "folder")
        assert labels is None or torch.equal(labels, y[:7])
    np.savez(tmp_path / "none.npz", z=np.zeros(3))
    for name, message in [
        ("absent.npz", "no images at"),
        ("absent", "no images at"),
        ("none.npz", "has no images x or arr_0: it holds z"),
        ("folder/000.png", "expected a folder, a .zip or an .npz"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_images(tmp_path / name)
    with pytest.raises(ValueError, match="num_samples=13 is outside 1 to 12"):
        StoredImages(open_images(tmp_path / "ours.npz"), limit=13)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_saved_as_png_are_read_with_their_channels(tmp_path, channels):
    x = torch.rand(4, channels, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    folder = save_pngs(Samples(x, torch.arange(4)), tmp_path)
    read = open_images(folder)
    assert read.shape == (channels, 5, 7)
    torch.testing.assert_close(torch.stack([read[i]["x"] for i in range(4)]), x, rtol=0, atol=0.51 / 127.5)


def test_a_grey_folder_of_any_kind_of_file_is_grey(tmp_path):
    for kind in ("png", "jpg", "bmp"):
        (tmp_path / kind).mkdir()
        Image.new("L", (7, 5)).save(tmp_path / kind / f"0.{kind}")
    assert {open_images(tmp_path / kind).shape for kind in ("png", "jpg", "bmp")} == {(1, 5, 7)}


def test_samples_are_the_same_however_they_are_shared():
    sampler = Sampler(plan(tiny_denoiser(), num_steps=2), 7)
    whole = torch.cat([x for x, _ in sampler.batches(range(7), 7, torch.device("cpu"))])
    part = [x for x, y in sampler.batches(range(2, 7), 3, torch.device("cpu")) if torch.equal(y, y)]
    torch.testing.assert_close(torch.cat(part), whole[2:], rtol=1e-4, atol=1e-5)
    assert sampler.seconds > 0


def test_references_of_every_kind(tmp_path):
    data = images()
    collected = collect(StoredImages(data), PIXELS, keep=Keep(features=True))
    ours = reference_of(collected, PIXELS)
    save_reference(ours, tmp_path / "ours.npz")
    again = load_reference(tmp_path / "ours.npz", extractor="pixels")
    assert (again.extractor, again.weights, again.shape) == ("pixels", None, (2, 3, 5))
    assert torch.equal(again.features, ours.features) and torch.equal(again.gaussian.mean, ours.gaussian.mean)
    mu, sigma = ours.gaussian.mean.numpy(), ours.gaussian.covariance.numpy()
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    assert load_reference(tmp_path / "edm.npz", extractor="pixels").extractor is None
    edm2 = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu + 1, "sigma": 2 * sigma}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(edm2))
    for extractor, shift in (("inception", 0), ("dinov2", 1)):
        read = load_reference(tmp_path / "edm2.pkl", extractor=extractor)
        np.testing.assert_array_equal(read.gaussian.mean, mu + shift)
        assert read.extractor == extractor
    with pytest.raises(ValueError, match="no statistics of pixels: it holds fid, fd_dinov2"):
        load_reference(tmp_path / "edm2.pkl", extractor="pixels")
    with pytest.raises(FileNotFoundError, match="no reference statistics"):
        load_reference(tmp_path / "absent.pkl", extractor="pixels")
    marker = tmp_path / "executed"
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="not on the allow-list"):
        load_reference(tmp_path / "evil.pkl", extractor="inception")
    assert not marker.exists()


def test_a_reference_of_something_else_is_refused():
    data = images()
    samples = collect(StoredImages(data), PIXELS)
    gaussian = samples.statistics.gaussian()
    for reference, message in [
        (Reference(gaussian, "inception"), "the reference holds features of inception, the samples of pixels"),
        (Reference(gaussian, shape=(2, 5, 3)), r"the reference is of images \[2, 5, 3\], the samples are \[2, 3, 5\]"),
        (Reference(Gaussian(torch.zeros(4), torch.eye(4))), "the reference has 4 features, pixels has 30"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(samples, reference, PIXELS, ["fid"])
    classifier = make_features("digits_classifier")
    digits = collect(StoredImages(load_data("digits", split="test")), classifier)
    other = Reference(digits.statistics.gaussian(), "digits_classifier", "0123456789abcdef")
    with pytest.raises(ValueError, match="with other weights of digits_classifier: 0123456789abcdef instead of"):
        measure(digits, other, classifier, ["fid"])
    with pytest.raises(ValueError, match="kid cannot do without: make it with keep_features=true"):
        measure(samples, Reference(gaussian), PIXELS, ["kid"])
    with pytest.raises(
        ValueError, match="class accuracy needs a classifier of the data's classes, which pixels is not"
    ):
        measure(samples, Reference(gaussian), PIXELS, ["accuracy"])
    with pytest.raises(ValueError, match="unknown measure 'fit'"):
        needed(["fit"])
    with pytest.raises(ValueError, match="splits=62 is outside 1 to 61"):
        collect(StoredImages(data), PIXELS, splits=62)


def test_too_few_samples_warn_with_the_number_that_is_wanted():
    few = collect(StoredImages(images(20)), PIXELS, splits=2)
    with pytest.warns(UserWarning, match="20 samples .* of 30 features singular: take at least 31"):
        measure(few, Reference(collect(StoredImages(images(61)), PIXELS).statistics.gaussian()), PIXELS, ["fid"])


def test_means_of_blocks():
    x = torch.arange(3 * 16 * 24, dtype=torch.float64).view(1, 3, 16, 24)
    values = make_features("pixels_8x8")(x)
    assert values.shape == (1, 3 * 64)
    assert values[0, 0] == x[0, 0, :2, :3].mean() and values[0, -1] == x[0, 2, -2:, -3:].mean()


def test_all_measures_of_the_digits_against_themselves():
    features = make_features("digits_classifier")
    names = list(MEASURES)
    digits = collect(StoredImages(load_data("digits", split="test")), features, keep=needed(names), splits=5)
    found = measure(digits, reference_of(digits, features), features, names)
    assert found["fid"].value < 1e-9 and found["fid"].part_mean > 0.1
    assert found["precision"].value == found["recall"].value == found["coverage"].value == 1
    assert found["accuracy"].value >= 0.99 and found["accuracy"].part_mean == pytest.approx(found["accuracy"].value)
    assert 6 < found["inception_score"].value < 10 and found["kid"].value < 0


def test_measures_that_share_work_do_it_once(monkeypatch):
    calls = []

    def once(samples, real):
        calls.append(len(samples))
        return 0.25, 0.75

    monkeypatch.setattr("diffdistill.metrics.measures.precision_recall", once)
    found = collect(StoredImages(images()), PIXELS, keep=Keep(features=True), splits=2)
    values = measure(found, reference_of(found, PIXELS), PIXELS, ["recall", "precision"])
    assert [*values] == ["recall", "precision"] and (values["precision"].value, values["recall"].value) == (0.25, 0.75)
    assert calls == [61, 31, 30]


def test_accuracy_needs_a_label_of_every_sample():
    features = make_features("digit_pixels")
    x, y = load_data("digits", split="test").tensors().values()
    data = TensorData(x, torch.where(torch.arange(len(y)) == 3, -1, y), num_classes=10)
    digits = collect(StoredImages(data), features, keep=Keep(logits=True))
    with pytest.raises(ValueError, match="class accuracy needs labelled samples"):
        measure(digits, reference_of(digits, features), features, ["accuracy"])


def test_samples_that_were_not_clipped_are_clipped_and_other_ranges_refused(tmp_path):
    x = np.linspace(-1.2, 1.1, 3 * 2 * 3 * 5, dtype=np.float32).reshape(3, 2, 3, 5)
    np.savez(tmp_path / "raw.npz", x=x)
    assert torch.equal(open_images(tmp_path / "raw.npz").tensors()["x"], torch.from_numpy(x).clamp(-1, 1))
    np.savez(tmp_path / "wild.npz", x=100 * x)
    with pytest.raises(ValueError, match=r"wild.npz' holds float32 from -120 to 110: expected floats in \[-1, 1\]"):
        open_images(tmp_path / "wild.npz")


def gaussian_rows(count, size, seed):
    return (
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, size)
        + seed / 10
    )


def collected(rows, logits=None):
    return Collected((FeatureStatistics().update(rows),), torch.zeros(len(rows)), (1,), rows, logits)


class Named(Features):
    name = "given"

    def both(self, x):
        return x, None


def test_measures_equal_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = gaussian_rows(230, 11, 0), gaussian_rows(190, 11, 3)
    logits = 3 * gaussian_rows(230, 7, 5)
    names = ["fid", "kid", "precision", "recall", "inception_score"]
    reference = reference_of(collected(y), Named())
    found = {name: m.value for name, m in measure(collected(x, logits), reference, Named(), names).items()}
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subset_size=190, kid_subsets=100, verbose=False)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc_features_to_metric(x.double(), y.double(), verbose=False)
    assert (found["precision"], found["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    theirs = isc_features_to_metric(logits.double())
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_inception_is_torch_fidelitys_port(tmp_path):
    port = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # The state of a port with random weights: the names are the published ones.
    made = port.FeatureExtractorInceptionV3.__new__(port.FeatureExtractorInceptionV3)
    load = port.load_state_dict_from_url
    try:
        port.load_state_dict_from_url = lambda url, progress=None: made.state_dict()
        made.__init__("inception-v3-compat", ["2048", "logits_unbiased"])
    finally:
        port.load_state_dict_from_url = load
    torch.save(made.state_dict(), tmp_path / "inception.pth")
    features = make_features("inception", path=tmp_path / "inception.pth")
    x = torch.rand(2, 1, 9, 7) * 2 - 1
    ours, logits = features.both(x)
    expected = made(to_bytes(x).contiguous())
    torch.testing.assert_close(ours, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert ours.shape == (2, 2048) and logits.shape == (2, 1008) and len(features.weights) == 64


def test_absent_packages_and_weights_are_one_sentence(tmp_path):
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"inception needs torch-fidelity: pip install 'diffdistill\[eval\]'"):
            make_features("inception")
    else:
        with pytest.raises(FileNotFoundError, match="no Inception weights at .*: get them from https"):
            make_features("inception", path=tmp_path / "absent.pth")
    try:
        import transformers  # noqa: F401
    except ImportError:
        from diffdistill.metrics.clip import CLIPScore

        with pytest.raises(ImportError, match=r"dinov2 needs transformers: pip install 'diffdistill\[eval\]'"):
            make_features("dinov2")
        with pytest.raises(ImportError, match="the CLIP score needs transformers"):
            CLIPScore()
    with pytest.raises(TypeError, match="has no option 'size': it takes path"):
        make_features("inception", size=3)


def test_the_clip_score_of_few_images_has_as_many_parts(tmp_path, monkeypatch):
    class Lengths:
        def __init__(self, *, model):
            pass

        def __call__(self, x, captions):
            return torch.tensor([float(len(caption)) for caption in captions])

    monkeypatch.setattr("diffdistill.metrics.clip.CLIPScore", Lengths)
    (tmp_path / "captions.txt").write_text("a\nabc\nabcdefgh\n")
    options = EvaluationOptions("pixels", measures=(), captions=str(tmp_path / "captions.txt"), clip="none", splits=5)
    record = evaluate(StoredImages(images(3)), options, data=None, device=torch.device("cpu"))
    assert record["measures"]["clip_score"] == {"value": 4.0, "part_mean": 4.0, "part_std": pytest.approx(13**0.5)}
    assert describe(record).endswith("over 3 parts")


def test_bytes_are_those_of_edm():
    x = torch.linspace(-1.2, 1.2, 1001)[:, None, None, None]
    expected = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    assert torch.equal(to_bytes(x)[:, 1], expected[:, 0]) and to_bytes(x).shape == (1001, 3, 1, 1)
    assert (
        float(frechet_distance(Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.ones(2), 4 * torch.eye(2)))) == 4
    )
