"""Models as files: what is saved comes back, and what is not ours is refused in one line."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save_file

from diffdistill.denoiser import Distilled
from diffdistill.models import (
    GaussianMixture,
    build_denoiser,
    fingerprint,
    guidance_student,
    load_denoiser,
    save_denoiser,
    with_guidance_input,
)
from diffdistill.models.loading import READERS
from tests.builders import tiny_denoiser

X, SIGMA, LABELS = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 7.0]), torch.tensor([0, 3, -1])


def rewrite(path, change=lambda config: None, state=None):
    """Write the file again with another config or other tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["diffdistill"])
    change(config)
    save_file(state or load(path.read_bytes()), path, metadata={"diffdistill": json.dumps(config)})


@pytest.mark.parametrize("place", ["model.safetensors", "folder"])
def test_round_trip(tmp_path, place):
    student = guidance_student(tiny_denoiser(), (0, 4))
    student.distilled = Distilled((80.0, 1.5, 0.0), "stochastic")
    save_denoiser(student, tmp_path / place, provenance={"command": "train", "loss": 0.5})
    loaded = load_denoiser(tmp_path / place)
    assert not loaded.training
    assert loaded.distilled == student.distilled and loaded.w_range == (0.0, 4.0)
    assert (loaded.sigma_min, loaded.sigma_max, loaded.data_shape, loaded.num_classes) == (0.002, 80.0, (2, 8, 8), 4)
    assert loaded.config["provenance"] == {"command": "train", "loss": 0.5}
    student.eval()
    out = student(X, SIGMA, LABELS, torch.ones(3))
    torch.testing.assert_close(
        loaded(X, SIGMA, LABELS, torch.ones(3)), out, rtol=1e-5, atol=1e-6
    )  # other memory format
    assert fingerprint(loaded) == fingerprint(student)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.safetensors"]
    # What was loaded can be saved again, and keeps where it came from.
    save_denoiser(loaded, tmp_path / "again.safetensors")
    assert load_denoiser(tmp_path / "again.safetensors").config == loaded.config


def test_configs_round_trip_and_fill_in_what_the_data_say():
    denoiser = tiny_denoiser()
    network = denoiser.config["network"]
    assert (network["img_resolution"], network["img_channels"], network["label_dim"]) == (8, 2, 4)
    assert build_denoiser(denoiser.config).config == denoiser.config
    assert json.loads(json.dumps(denoiser.config)) == denoiser.config


def test_a_guidance_student_equals_its_teacher_exactly_for_every_weight():
    teacher = tiny_denoiser().double()
    student = guidance_student(teacher, (0.0, 4.0), w_channels=10)
    assert student.dtype == torch.float64 and student.model.map_w.in_features == 10
    x = X.double()
    for w in (None, torch.tensor([0.0, 1.7, 4.0])):
        assert torch.equal(student(x, SIGMA, LABELS, w), teacher(x, SIGMA, LABELS))
    student.model.map_w.weight.data.fill_(0.1)
    assert not torch.equal(student(x, SIGMA, LABELS, torch.ones(3)), teacher(x, SIGMA, LABELS))
    assert teacher.config["w_range"] is None and "w_channels" not in teacher.config["network"]
    with pytest.raises(ValueError, match="takes a guidance weight already"):
        guidance_student(student, (0.0, 4.0))
    teacher.model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"do not fit its config: .* unexpected \['model.extra.weight'"):
        guidance_student(teacher, (0.0, 4.0))
    with pytest.raises(ValueError, match="must be \\(least, greatest\\)"):
        with_guidance_input(teacher.config, (4.0, 0.0))


def test_fingerprints_tell_weights_and_configs_apart():
    first = fingerprint(tiny_denoiser())
    assert first == fingerprint(tiny_denoiser()) and len(first) == 16
    assert first != fingerprint(tiny_denoiser(seed=1))
    assert first != fingerprint(tiny_denoiser(preconditioning={"name": "edm", "sigma_data": 0.6}))


def test_fingerprints_are_computed_once_and_again_where_weights_change(monkeypatch):
    denoiser = tiny_denoiser()
    first = fingerprint(denoiser)
    copied = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copied.append(self) or self.clone())
    with torch.inference_mode():
        assert fingerprint(denoiser) == first and not copied
    bias = next(p for name, p in denoiser.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        bias.neg_()
        assert fingerprint(denoiser) != first and copied
        bias.neg_()
    assert fingerprint(denoiser) == first
    assert fingerprint(denoiser.double()) != first
    denoiser.config = {**denoiser.config, "sigma_max": 70.0}
    assert fingerprint(denoiser.float()) != first


def test_unknown_models(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'digits-techer': choose one of .* or give the path"):
        load_denoiser("digits-techer")
    with pytest.raises(ValueError, match="holds no model: expected one of model.safetensors"):
        load_denoiser(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"models end in \.safetensors"):
        load_denoiser(tmp_path / "model.onnx")


def test_damaged_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_denoiser(tiny_denoiser(), path)
    whole = path.read_bytes()
    for size in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_denoiser(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no model of diffdistill"):
        load_denoiser(path)


def test_files_of_another_version_or_architecture(tmp_path):
    path = tmp_path / "model.safetensors"
    for change, message in (
        (lambda c: c.update(format=99), "has model format 99: this version reads format 1"),
        (lambda c: c["network"].update(num_blocks=2), "holds another architecture: .* missing, first model"),
        (lambda c: c["network"].update(attn_resolutions=[]), "holds another architecture: .* unexpected, first model"),
        (lambda c: c["network"].update(model_channels=16), "of another shape, first .* is .* instead of"),
        (lambda c: c["network"].update(name="vit"), "builds no model: unknown network 'vit': choose one of"),
        (lambda c: c["network"].update(depth=2), "builds no model: network 'song_unet' has no option 'depth'"),
        (lambda c: c.update(data_shape=[]), "builds no model"),
        (lambda c: c.update(num_classes=-3), "builds no model"),
        (lambda c: c["network"].update(channel_mult=[0]), "builds no model"),
        (lambda c: c.update(sigma_min="low"), "0 < sigma_min < sigma_max, not 'low'"),
        (lambda c: c.update(autoencoder=[1]), "builds no model"),
    ):
        save_denoiser(tiny_denoiser(), path)
        rewrite(path, change)
        with pytest.raises(ValueError, match=message) as error:
            load_denoiser(path)
        assert "\n" not in str(error.value)


def test_bad_configs():
    config = tiny_denoiser().config
    with pytest.raises(ValueError, match="needs 'sigma_max': it has"):
        build_denoiser({key: value for key, value in config.items() if key != "sigma_max"})
    with pytest.raises(ValueError, match="has no entry 'sigma'"):
        build_denoiser({**config, "sigma": 1.0})
    with pytest.raises(ValueError, match="the network takes 4 class labels, but num_classes is 3"):
        build_denoiser({**config, "num_classes": 3})
    with pytest.raises(ValueError, match="w_channels > 0 needs one"):
        build_denoiser({**config, "w_range": [0, 4]})
    with pytest.raises(ValueError, match="has no config"):
        save_denoiser(GaussianMixture([1.0], torch.zeros(1, 2), [1.0]), "nowhere.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_denoiser(tiny_denoiser(), path)
    before = path.read_bytes()

    def full_disk(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_denoiser(tiny_denoiser(seed=1), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_other_formats_can_be_added(tmp_path, monkeypatch):
    denoiser = tiny_denoiser()
    monkeypatch.setitem(READERS, ".foreign", lambda path: denoiser)
    (tmp_path / "net.foreign").write_text("")
    assert load_denoiser(tmp_path / "net.foreign") is denoiser


def test_solvers_import_neither_models_nor_safetensors():
    code = """
import sys, diffdistill.solvers
names = ("diffdistill.models", "safetensors", "hydra", "torchvision", "matplotlib")
assert not [module for module in sys.modules if module.startswith(names)]
from diffdistill import load_denoiser, sample
"""
    subprocess.run([sys.executable, "-c", code], check=True)
