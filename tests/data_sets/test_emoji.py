import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import load_data
from diffdistill.data.emoji import CLASSES
from diffdistill.data.emoji_source import CATEGORIES, main, over_grey, read_graphics


def test_the_emoji_are_those_that_the_source_gives():
    x, y = load_data("emoji").tensors().values()
    assert x.shape == (1873, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    counts = {"activities": 85, "animals": 159, "flags": 263, "food": 131, "objects": 264, "people": 360}
    assert dict(zip(CLASSES, y.bincount().tolist(), strict=True)) == counts | {
        "smileys": 169,
        "symbols": 224,
        "travel": 218,
    }
    values = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    digest = hashlib.sha256(values.numpy().tobytes() + y.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "e6629764929c0366bb5af8d3bfe29388c4dff2df9b4c2dd83a82435568b6c0fd"


def test_a_smiley_is_a_yellow_disc_over_grey():
    smileys = load_data("emoji").tensors()["x"][load_data("emoji").tensors()["y"] == CLASSES.index("smileys")]
    first = smileys[0]
    assert float(first[:, 0, 0].abs().max()) < 0.01
    red, green, blue = first[:, 4, 16].tolist()
    assert red > 0.9 and green > 0.4 and blue < 0


def test_the_small_images_are_means_of_the_large_ones():
    large, small = (load_data("emoji", split="test", resolution=size).tensors()["x"] for size in (32, 16))
    assert small.shape == (370, 3, 16, 16)
    torch.testing.assert_close(small[7, :, 3, 11], large[7, :, 6:8, 22:24].mean(dim=(1, 2)))
    assert float(small.mean(dim=(0, 2, 3)).abs().max()) < 0.25


def test_the_splits_part_the_set_and_keep_the_classes_in_proportion():
    whole, train, test = (load_data("emoji", split=s, resolution=16).tensors() for s in ("all", "train", "test"))
    assert len(train["x"]) + len(test["x"]) == len(whole["x"])
    assert torch.equal(test["y"].bincount(), whole["y"].bincount() // 5)
    together = torch.cat([train["x"], test["x"]]).flatten(1).unique(dim=0)
    assert torch.equal(together, whole["x"].flatten(1).unique(dim=0))


def test_what_the_emoji_refuse():
    with pytest.raises(ValueError, match="emoji have no resolution 64: choose one of 16, 32"):
        load_data("emoji", resolution=64)
    with pytest.raises(ValueError, match="split must be one of all, train, test, but is 'held_out'"):
        load_data("emoji", split="held_out")
    with pytest.raises(TypeError, match="has no option 'size': it takes split, resolution"):
        load_data("emoji", size=16)


def test_a_picture_is_laid_over_grey_and_averaged():
    picture = np.zeros((64, 64, 4), dtype=np.uint8)
    picture[..., 0] = 255  # red, under an alpha that falls from left to right
    picture[:, :20, 3], picture[:, 20:21, 3] = 255, 102
    small = over_grey(picture, resolution=32)
    assert small.shape == (32, 32, 3)
    assert small[5, 9].tolist() == [255, 0, 0] and small[5, 11].tolist() == [128, 128, 128]
    # Half of the pixel is 40 % red over grey, the other half grey.
    assert small[5, 10].tolist() == [round(127.5 + 0.2 * 127.5), round(0.8 * 127.5), round(0.8 * 127.5)]
    with pytest.raises(ValueError, match=r"64x64 with four channels, not \[32, 64, 4\]"):
        over_grey(picture[::2], resolution=32)


@pytest.fixture
def package(tmp_path):
    """A publisher's folder with three pictures of food, of which two are the same, and what is to be left out."""
    folder = tmp_path / "package"
    (folder / "img/twitter/64").mkdir(parents=True)
    entries = []
    for order, (name, category, colour) in enumerate(
        [
            ("b", "Food & Drink", "red"),
            ("a", "Food & Drink", "lime"),
            ("c", "Food & Drink", "lime"),
            ("d", "Flags", "lime"),
            ("e", "Component", "blue"),
        ]
    ):
        Image.new("RGB", (64, 64), colour).save(folder / f"img/twitter/64/{name}.png")
        entries.append({"image": f"{name}.png", "category": category, "sort_order": 9 - order, "has_img_twitter": True})
    entries.append({"image": "x.png", "category": "Flags", "sort_order": 20, "has_img_twitter": False})
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def test_graphics_are_read_in_order_without_repeats_and_parts(package):
    images, labels = read_graphics(package)
    assert [CATEGORIES[label] for label in labels] == ["Flags", "Food & Drink", "Food & Drink"]
    assert images[:, 3, 4].tolist() == [[0, 255, 0], [0, 255, 0], [255, 0, 0]]


def test_the_source_as_a_command(package, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no emoji.json in .*: unpack emoji-datasource-twitter there"):
        main([str(tmp_path), "out.npz"])
    with pytest.raises(SystemExit, match="npm pack"):
        main([])
    main([str(package), str(tmp_path / "out.npz")])
    assert "3 emoji (activities 0" in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["x"].shape == (3, 32, 32, 3) and arrays["y"].tolist() == [2, 3, 3]
