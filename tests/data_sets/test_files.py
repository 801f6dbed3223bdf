import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffdistill.data import MirroredData, TensorData, load_data
from diffdistill.sampling.samples import Samples, save_npz


def pixels(seed, height=6, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_input(image):
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "set.zip"
    labels = []
    with zipfile.ZipFile(path, "w") as file:
        for i in reversed(range(7)):
            name = f"{i // 4:05d}/img{i:08d}.{'npy' if i == 5 else 'png'}"
            with file.open(name, "w") as entry:
                if i == 5:
                    np.save(entry, pixels(i).transpose(2, 0, 1))
                else:
                    Image.fromarray(pixels(i)).save(entry, "png")
            labels.append([name, i % 3])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_a_zip_gives_images_and_labels_in_the_order_of_names(archive):
    data = load_data("zip", path=archive, resolution=6)
    assert (len(data), data.shape, data.num_classes) == (7, (3, 6, 6), 3)
    for i in range(7):
        torch.testing.assert_close(data[i]["x"], as_input(pixels(i)))
        assert int(data[i]["y"]) == i % 3


def test_a_zip_is_read_by_forked_and_by_pickled_processes(archive):
    data = load_data("zip", path=archive)
    expected = data.tensors()
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.tensors()["x"], expected["x"])
    for _ in range(2):
        batches = list(DataLoader(data, batch_size=1, num_workers=2))
        assert torch.equal(torch.cat([batch["x"] for batch in batches]), expected["x"])


def test_another_process_opens_the_zip_for_itself(archive, monkeypatch):
    data = load_data("zip", path=archive)
    handle = data._open()
    assert data._open() is handle
    monkeypatch.setattr("os.getpid", lambda: -5)
    assert data._open() is not handle


@pytest.mark.parametrize("labels", ['{"labels": null}', "{}"])
def test_a_zip_without_labels_has_no_classes(tmp_path, labels):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        with file.open("a.npy", "w") as entry:
            np.save(entry, np.full((1, 2, 3), 0.25, np.float32))
        file.writestr("dataset.json", labels)
    data = load_data("zip", path=path)
    assert (data.num_classes, int(data[0]["y"]), data.shape) == (0, -1, (1, 2, 3))
    assert torch.equal(data[0]["x"], torch.full((1, 2, 3), 0.25))


def test_zip_errors_name_the_fault(archive, tmp_path):
    with pytest.raises(ValueError, match="holds images of 6x6, not 8x8"):
        load_data("zip", path=archive, resolution=8)
    with pytest.raises(FileNotFoundError, match="no zip data set at"):
        load_data("zip", path=tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(ValueError, match="is not a zip archive"):
        load_data("zip", path=tmp_path / "text.zip")
    for value, labels, message in [
        (2.0, [["a.npy", 0]], "'a.npy': values must lie in"),
        (float("nan"), [["a.npy", 0]], "'a.npy': values must lie in"),
        (0.0, [["b.npy", 0]], "has no label for 'a.npy'"),
        (0.0, [["a.npy", 0.5]], "label 0.5 of 'a.npy' is not a non-negative integer"),
    ]:
        path = tmp_path / "bad.zip"
        with zipfile.ZipFile(path, "w") as file:
            with file.open("a.npy", "w") as entry:
                np.save(entry, np.full((1, 2, 2), value))
            file.writestr("dataset.json", json.dumps({"labels": labels}))
        with pytest.raises(ValueError, match=message):
            load_data("zip", path=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", '{"lab', 'dataset.json of .*bad.zip. is not {"labels"'),
        ("dataset.json", "[]", 'dataset.json of .*bad.zip. is not {"labels"'),
        ("dataset.json", '{"labels": [1, 2]}', 'dataset.json of .*bad.zip. is not {"labels"'),
        ("0.png", "text", "cannot read .*bad.zip.0.png.: it is no picture, or is damaged; data.skip_damaged=true"),
        ("0.npy", "text", "cannot read .*bad.zip.0.npy.: .*; data.skip_damaged=true"),
    ],
)
def test_a_damaged_entry_of_a_zip_is_named(tmp_path, name, content, message):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        with file.open("a.npy", "w") as entry:
            np.save(entry, np.zeros((1, 2, 2)))
        file.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        load_data("zip", path=tmp_path / "bad.zip")


def test_a_zip_with_a_flipped_bit_names_the_image(tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as file, file.open("a.npy", "w") as entry:
        np.save(entry, np.zeros((1, 2, 2)))
    content = bytearray(path.read_bytes())
    content[160] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read .*bad.zip.a.npy.: Bad CRC-32"):
        load_data("zip", path=path)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_16_bits_keep_their_range(tmp_path, channels):
    values = np.linspace(0, 65535, 42).reshape(6, 7)
    (tmp_path / "images").mkdir()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "images/a.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.write(tmp_path / "images/a.png", "a.png")
    expected = torch.from_numpy(values / 65535 * 2 - 1).float()
    for data, c in [
        (load_data("images", root=tmp_path / "images", channels=channels), channels),
        (load_data("zip", path=tmp_path / "set.zip"), 1),
    ]:
        torch.testing.assert_close(data[0]["x"], expected.expand(c, 6, 7), atol=1 / 255, rtol=0)


def test_an_image_of_another_size_is_an_error_when_it_is_read(archive):
    with zipfile.ZipFile(archive, "a") as file, file.open("00000/z.npy", "w") as entry:
        np.save(entry, np.zeros((3, 5, 6), np.uint8))
    with zipfile.ZipFile(archive, "a") as file:
        labels = json.loads(file.read("dataset.json"))["labels"] + [["00000/z.npy", 0]]
    stripped = archive.with_name("second.zip")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(stripped, "w") as target:
        for name in source.namelist():
            if name != "dataset.json":
                target.writestr(name, source.read(name))
        target.writestr("dataset.json", json.dumps({"labels": labels}))
    data = load_data("zip", path=stripped)
    with pytest.raises(
        ValueError, match=r"'00000/z.npy' has shape .3, 5, 6., the first image '00000/img00000000.png' .3, 6, 6."
    ):
        data[4]


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        place = tmp_path / "images" / ("cat" if i < 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(place / f"{i}.png")
    return tmp_path / "images"


def test_sub_folders_are_classes(folder):
    data = load_data("images", root=folder)
    assert (len(data), data.shape, data.num_classes) == (5, (3, 6, 6), 2)
    x, y = data.tensors().values()
    torch.testing.assert_close(x, torch.stack([as_input(pixels(i)) for i in range(5)]))
    assert y.tolist() == [0, 0, 1, 1, 1]


def test_a_flat_folder_has_no_labels(folder):
    data = load_data("images", root=folder / "dog", channels=1)
    assert (len(data), data.num_classes, data.shape) == (3, 0, (1, 6, 6))
    assert int(data[1]["y"]) == -1


def test_resize_and_crop_take_the_centre(tmp_path):
    # An antialiasing filter keeps a ramp a ramp: pixel j of 4 averages the columns 4 + 2j and 5 + 2j of 16.
    ramp = np.broadcast_to(10 * np.arange(16, dtype=np.uint8), (8, 16))
    Image.fromarray(ramp.copy()).save(tmp_path / "wide.png")
    Image.fromarray(ramp.T.copy()).save(tmp_path / "high.png")
    high, wide = load_data("images", root=tmp_path, resolution=4).tensors()["x"]
    expected = (45 + 20 * torch.arange(4)) / 127.5 - 1
    torch.testing.assert_close(wide, expected.expand(3, 4, 4), atol=1.01 / 127.5, rtol=0)
    torch.testing.assert_close(high, wide.mT)


def test_folder_errors_name_the_fault(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image folder at"):
        load_data("images", root=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        load_data("images", root=tmp_path / "empty")
    with pytest.raises(ValueError, match="is 6x6, smaller than resolution 7"):
        load_data("images", root=folder, resolution=7)
    Image.fromarray(pixels(9, 5, 6)).save(folder / "dog" / "9.png")
    with pytest.raises(ValueError, match="set resolution"):
        load_data("images", root=folder).tensors()
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        load_data("images", root=folder, channels=4)


def test_flips_double_the_set_with_mirror_images(folder, archive):
    for plain, flipped in [
        (load_data("images", root=folder), load_data("images", root=folder, flip=True)),
        (load_data("zip", path=archive), load_data("zip", path=archive, flip=True)),
    ]:
        n = len(plain)
        assert (len(flipped), flipped.shape, flipped.num_classes) == (2 * n, plain.shape, plain.num_classes)
        for i in range(n):
            assert torch.equal(flipped[i]["x"], plain[i]["x"])
            assert torch.equal(flipped[n + i]["x"], plain[i]["x"].flip(-1))
            assert flipped[n + i]["y"] == plain[i]["y"]
        items = torch.stack([flipped[i]["x"] for i in range(2 * n)])
        assert torch.equal(flipped.tensors()["x"], items)
        assert torch.equal(flipped[-1]["x"], items[-1])
        with pytest.raises(IndexError):
            flipped[2 * n]


def test_mirroring_turns_rows_and_not_columns():
    x = torch.arange(30.0).view(1, 1, 5, 6) / 30
    mirrored = MirroredData(TensorData(x, torch.zeros(1), num_classes=1))[1]["x"]
    assert torch.equal(mirrored[0, 2], x[0, 0, 2].flip(0))


def test_tensors_out_of_range_or_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"span \[-1.5, 1\]"):
        TensorData(torch.tensor([-1.5, 1.0]).view(2, 1, 1, 1), torch.zeros(2), num_classes=1)
    with pytest.raises(ValueError, match="with labels"):
        TensorData(torch.zeros(2, 1, 5, 6), torch.zeros(3), num_classes=1)


def test_unknown_names_and_options_list_the_valid_ones():
    names = "cifar10, digits, emoji, images, latents, samples, shapes, zip"
    with pytest.raises(ValueError, match=f"unknown data set 'mnist': choose one of {names}"):
        load_data("mnist")
    with pytest.raises(TypeError, match="has no option 'flip': it takes split"):
        load_data("digits", flip=True)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    # The published layout with 4 images per file; torchvision's list of checksums is made to fit.
    import hashlib

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(seed):
        data = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
        return {"data": data, "labels": [seed, 1, 2, 9]}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch(i)) for i in (3, 4)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(5))])
    name, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return tmp_path, batch


def test_cifar10_reads_the_published_layout(cifar):
    root, batch = cifar
    data = load_data("cifar10", root=root, flip=True)
    assert (len(data), data.shape, data.num_classes) == (16, (3, 32, 32), 10)
    expected = torch.from_numpy(batch(4)["data"].reshape(4, 3, 32, 32).astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(data.tensors()["x"][4:8], expected)
    torch.testing.assert_close(data[8 + 5]["x"], expected[1].flip(-1))
    assert load_data("cifar10", root=root, split="test").tensors()["y"].tolist() == [5, 1, 2, 9]


def test_absent_cifar10_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        load_data("cifar10", root=tmp_path)


def test_samples_of_a_model_are_a_data_set(tmp_path):
    x, y = torch.rand(5, 1, 4, 4) * 2 - 1, torch.tensor([2, 0, 1, 2, 0])
    path = save_npz(Samples(x, y), tmp_path)
    data = load_data("samples", path=path)
    assert (len(data), data.shape, data.num_classes) == (5, (1, 4, 4), 3)
    assert torch.equal(data[3]["x"], x[3]) and int(data[3]["y"]) == 2
    assert load_data("samples", path=save_npz(Samples(x, torch.full((5,), -1)), tmp_path)).num_classes == 0


def test_a_file_that_holds_no_samples_is_refused(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(FileNotFoundError, match="no samples at"):
        load_data("samples", path=path)
    for content in (b"", b"PK\x03\x04 and no more", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an .npz file"):
            load_data("samples", path=path)
    for arrays, message in (
        ({"z": np.zeros((2, 1, 4, 4))}, "has no images x or arr_0: it holds z"),
        ({"x": np.full((2, 1, 4, 4), 1.5)}, r"holds float64 from 1.5 to 1.5: expected floats in \[-1, 1\]"),
        ({"x": np.zeros((2, 1, 4, 4)), "y": np.zeros(3, int)}, r"int64 \[3\]: expected a label for each of the 2"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_data("samples", path=path)
