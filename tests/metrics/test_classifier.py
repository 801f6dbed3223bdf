import pytest
import torch
from safetensors.torch import save_file

from diffdistill.data import load_data
from diffdistill.metrics import extract, frechet_distance, gaussian_of, load_classifier, measure_memorisation
from diffdistill.metrics import make_features as make
from diffdistill.metrics.classifier import classifier_provenance, save_classifier, train_classifier


@pytest.fixture(scope="module")
def held_out():
    return load_data("digits", split="test").tensors()


def test_the_shipped_classifier_has_the_accuracy_that_it_states(held_out):
    model = load_classifier()
    provenance = classifier_provenance()
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    accuracy = model.accuracy(**held_out)
    assert accuracy >= 0.99
    assert provenance["accuracy_held_out"] == f"{accuracy:.4f}"
    assert provenance["command"].startswith("python scripts/train_classifier.py ")
    assert model.accuracy(held_out["x"], (held_out["y"] + 1) % 10) < 0.01


def test_features_are_those_below_the_logits(held_out):
    model = load_classifier()
    features = extract(make("digits_classifier"), held_out["x"], batch_size=100)
    assert features.shape == (355, 64) and features.dtype == torch.float64
    torch.testing.assert_close(model.head(features.float()), model(held_out["x"]), rtol=1e-4, atol=1e-4)
    assert torch.equal(extract(make("pixels"), held_out["x"])[3], held_out["x"][3].flatten().double())


def test_training_leaves_the_global_random_state_and_repeats_itself():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_classifier(updates=2, batch_size=8, seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, other = (train_classifier(updates=2, batch_size=8, seed=seed) for seed in (1, 2))
    assert torch.equal(first.head.weight, second.head.weight) and not torch.equal(first.head.weight, other.head.weight)


def test_forty_updates_already_learn(held_out):
    assert train_classifier(updates=40, batch_size=64).accuracy(**held_out) > 0.3


def test_the_shipped_emoji_classifier_has_the_accuracy_that_it_states():
    unseen = load_data("emoji", split="test", resolution=16).tensors()
    model, provenance = load_classifier(subject="emoji"), classifier_provenance("emoji")
    accuracy = model.accuracy(**unseen)
    assert sum(p.numel() for p in model.parameters()) < 150_000
    assert accuracy >= 0.6 and provenance["accuracy_held_out"] == f"{accuracy:.4f}"
    # The classes are unequal: the most frequent one alone would be right in a fifth of the cases.
    assert model.accuracy(unseen["x"], (unseen["y"] + 1) % 9) < 0.15


@pytest.mark.parametrize(("name", "width"), [("emoji_pixels", 768), ("emoji_classifier", 96)])
def test_features_of_emoji_come_with_the_answers_of_their_classifier(name, width):
    x = load_data("emoji", split="test", resolution=16).tensors()["x"][:7]
    features, logits = make(name).both(x)
    assert features.shape == (7, width) and logits is not None
    torch.testing.assert_close(logits, load_classifier(subject="emoji")(x))
    assert (make(name).num_classes, make("emoji_classifier").weights) == (9, make("emoji_pixels").weights)


def test_features_are_differentiable_in_the_images():
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    make("emoji_classifier")(x).sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(dim=1) > 0).all())


def test_classifier_files(tmp_path):
    model = train_classifier(updates=1, batch_size=8)
    save_classifier(model, tmp_path / "c.safetensors", {"command": "none"})
    again = load_classifier(tmp_path / "c.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of a digit classifier"):
        load_classifier(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no classifier at"):
        load_classifier(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"a digit classifier takes images \[B, 1, 8, 8\], not \[2, 1, 7, 8\]"):
        model(torch.zeros(2, 1, 7, 8))


def test_held_out_digits_calibrate_the_measures(held_out):
    train, test = (load_data("digits", split=split).tensors()["x"] for split in ("train", "test"))
    pixels = make("pixels")
    distance = frechet_distance(gaussian_of(pixels, held_out["x"]), gaussian_of(pixels, train))
    assert distance == pytest.approx(0.2659, abs=1e-3)
    copies = measure_memorisation(train, train)
    assert (copies.ratio, copies.closer_share) == (0, 1)
    found = measure_memorisation(held_out["x"], train, test)
    assert found.ratio == 1 and found.closer_share == pytest.approx(0.05, abs=0.005)
    # The training digits among themselves stand in for unseen ones.
    assert measure_memorisation(held_out["x"], train).ratio == pytest.approx(1, abs=0.02)


def test_what_the_classifier_refuses():
    with pytest.raises(ValueError, match=r"one label per image, shape \[70\], not \[69\]"):
        load_classifier().accuracy(torch.rand(70, 1, 8, 8), torch.zeros(69).long())
    with pytest.raises(ValueError, match="there is no classifier of 'letters': choose one of digits, emoji"):
        load_classifier(subject="letters")
    with pytest.raises(ValueError, match="unknown feature extractor 'vgg': choose one of digit_pixels, digits_class"):
        make("vgg")
