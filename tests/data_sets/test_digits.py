import hashlib

import pytest
import torch

from diffdistill.data import load_data


def test_the_digits_are_the_published_ones():
    x, y = load_data("digits").tensors().values()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    values = ((x + 1) * 8).to(torch.uint8)
    assert torch.equal(values.float() / 8 - 1, x) and values.min() == 0 and values.max() == 16
    # The sum of all grey values of optdigits.tes, and of the bytes themselves.
    assert int(values.long().sum()) == 561718
    digest = hashlib.sha256(values.numpy().tobytes() + y.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_first_digit_reads_as_published():
    first = load_data("digits")[0]
    assert int(first["y"]) == 0
    assert ((first["x"][0, 0] + 1) * 8).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_the_splits_part_the_set_and_keep_the_classes_in_proportion():
    whole, train, test = (load_data("digits", split=s).tensors() for s in ("all", "train", "test"))
    together = torch.cat([train["x"], test["x"]]).flatten(1).unique(dim=0)
    assert len(train["x"]) + len(test["x"]) == len(whole["x"])
    assert torch.equal(together, whole["x"].flatten(1).unique(dim=0))
    assert torch.equal(test["y"].bincount(), whole["y"].bincount() // 5)
    assert torch.equal(load_data("digits", split="test").tensors()["x"], test["x"])


def test_a_wrong_split_lists_the_valid_ones():
    with pytest.raises(ValueError, match="split must be one of all, train, test, but is 'valid'"):
        load_data("digits", split="valid")
