"""Folders as they are on real disks: what is found, in which order, and what is skipped."""

import logging
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import load_data
from diffdistill.data.captions import read_captions
from diffdistill.data.finding import find_pictures, in_order
from diffdistill.metrics.sources import StoredImages, open_images


def put(folder, *names, value=0):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
        else:
            path.write_text("x")


JUNK = [
    *(".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "._a.png", "Thumbs.db", ".DS_Store", "desktop.ini"),
    *("@eaDir/a.png", ".git/config", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png"),
]


def test_what_systems_leave_is_no_class_and_no_image(tmp_path):
    put(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png")
    clean = load_data("images", root=tmp_path)
    put(tmp_path, *JUNK)
    data = load_data("images", root=tmp_path)
    assert (len(data), data.num_classes, data.names) == (3, 2, clean.names)
    assert "2 classes (0 = cat, 1 = dog); skipped: 10 left by a system (" in data.found


def test_what_is_skipped_is_said_with_its_reason(tmp_path, caplog):
    put(tmp_path, "cat/0.png", "cat/notes.txt", "dog/deeper/1.png", "loose.png", "logs/log.json", "labels.csv")
    with caplog.at_level(logging.INFO, "diffdistill"):
        data = load_data("images", root=tmp_path)
    (line,) = [record.message for record in caplog.records]
    assert (
        line
        == data.found
        == (
            f"{tmp_path}: 2 images, 2 classes (0 = cat, 1 = dog); skipped: 3 no picture by its name (cat/notes.txt, "
            "labels.csv, logs/log.json), 1 without pictures (logs/), 1 beside the folders of classes (loose.png)"
        )
    )


def test_folders_without_pictures_beside_pictures_make_no_classes(tmp_path):
    put(tmp_path, "0.png", "logs/log.json")
    data = load_data("images", root=tmp_path)
    assert (len(data), data.num_classes) == (1, 0) and "1 without pictures (logs/)" in data.found


def test_folders_named_by_numbers_are_labels(tmp_path):
    put(tmp_path, *(f"{i}/0.png" for i in (0, 2, 10, 11)))
    data = load_data("images", root=tmp_path)
    assert data.num_classes == 12 and [int(data[i]["y"]) for i in range(4)] == [0, 2, 10, 11]
    assert "(0 = 0, 2 = 2, 10 = 10, 11 = 11)" in data.found
    put(tmp_path, "02/0.png")
    with pytest.raises(ValueError, match="two folders stand for the label 2"):
        find_pictures(tmp_path)
    put(tmp_path / "dates", "20260101/0.png")
    with pytest.raises(ValueError, match="'20260101' would be a label"):
        find_pictures(tmp_path / "dates")


def test_names_are_in_natural_order(tmp_path):
    assert in_order(["a10", "a2", "b1", "a02"]) == ["a02", "a2", "a10", "b1"]
    put(tmp_path, *(f"c{i}/{j}.png" for i in (1, 10, 2) for j in (1, 10, 9)))
    found = find_pictures(tmp_path)
    assert list(found.classes) == ["c1", "c2", "c10"]
    assert [name for name, _ in found.items][:3] == ["c1/1.png", "c1/9.png", "c1/10.png"]


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_set_is_grey_only_if_all_images_are(kind, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(colours[0]).convert("L").save(folder / "0.png")
    sources = {"folder": folder, "archive": tmp_path / "set.zip"}

    def opened():
        with zipfile.ZipFile(sources["archive"], "w") as file:
            for path in sorted(folder.iterdir()):
                file.write(path, path.name)
        return open_images(sources[kind])

    assert opened().shape == (1, 4, 4)
    Image.fromarray(colours[1]).save(folder / "1.png")
    data = opened()
    x = data.tensors()["x"]
    assert x.shape == (2, 3, 4, 4)
    np.testing.assert_allclose(x[1], colours[1].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_an_archive_is_found_as_a_folder_is(tmp_path):
    put(tmp_path / "set", *(f"{i}.png" for i in (0, 2, 10)), "__MACOSX/._0.png", "read.me")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in sorted((tmp_path / "set").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "set"))
    (tmp_path / "set" / "10.png").write_bytes(b"\x89PNG damaged")
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as file:
        file.writestr("11.png", b"\x89PNG damaged")
    data = load_data("zip", path=tmp_path / "set.zip", skip_damaged=True)
    assert data.names == ["0.png", "2.png", "10.png"]
    for reason in ("1 left by a system", "1 no picture by its name (read.me)", "1 damaged (11.png)"):
        assert reason in data.found


def test_an_image_of_another_size_is_named_with_both(tmp_path):
    put(tmp_path, "0.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "1.png")
    with pytest.raises(
        ValueError, match=r"1.png' has shape .3, 4, 5., the first image '0.png' .3, 4, 4.: set resolution"
    ):
        load_data("images", root=tmp_path).tensors()


NAMES = [f"{i}.png" for i in range(12)]
CAPTIONS = [f"number {i},\u2028in two\u0085lines" for i in range(12)]


@pytest.mark.parametrize("form", ["lines", "lines of Windows", "names", "json", "folder"])
def test_captions_belong_to_their_images(form, tmp_path):
    put(tmp_path / "images", *NAMES)
    names = StoredImages(load_data("images", root=tmp_path / "images")).names
    shuffled = sorted(zip(NAMES, CAPTIONS, strict=True))  # in the order of text: 0, 1, 10, 11, 2, ...
    path = tmp_path / "captions.txt"
    if form.startswith("lines"):
        path.write_bytes(("\r\n" if "Windows" in form else "\n").join(CAPTIONS).encode() + b"\n")
    elif form == "names":
        path.write_text("\n".join(f"{name}\t{text}" for name, text in shuffled), encoding="utf-8", newline="")
    elif form == "json":
        path = tmp_path / "captions.json"
        import json

        path.write_text(json.dumps(dict(shuffled)))
    else:
        path = tmp_path / "captions"
        path.mkdir()
        for name, text in shuffled:
            (path / name).with_suffix(".txt").write_text(text, encoding="utf-8", newline="")
    assert read_captions(path, 12, names) == CAPTIONS


def test_captions_that_are_missing_or_too_many_are_said(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a\nb")
    with pytest.raises(ValueError, match="has 2 captions for 3 images"):
        read_captions(path, 3)
    path.write_text("0.png\ta\n2.png\tb")
    with pytest.raises(ValueError, match="no caption for the image '1.png'"):
        read_captions(path, 3, ["0.png", "1.png", "2.png"])
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON of"):
        read_captions(tmp_path / "c.json", 3, ["0.png"])
    with pytest.raises(FileNotFoundError, match="no captions at"):
        read_captions(tmp_path / "nowhere", 3)
