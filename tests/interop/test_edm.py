"""EDM pickles and AMED predictors come back with equal outputs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import diffdistill
from diffdistill.interop import ForeignFileError, read_foreign
from diffdistill.interop.formats.building import ALWAYS_LABELLED
from diffdistill.models import save_denoiser
from tests.interop.persistence import Persistent, add, network, pickled, release

DATA = Path(__file__).resolve().parents[1] / "data"
NETWORKS = json.loads((DATA / "networks" / "networks.json").read_text())


def reference(name):
    arrays = np.load(DATA / "networks" / f"{name}.npz", allow_pickle=False)
    state = {key.removeprefix("state/"): arrays[key] for key in arrays.files if key.startswith("state/")}
    inputs = {key: torch.from_numpy(arrays[key]) for key in arrays.files if not key.startswith("state/")}
    return state, inputs


def written(path, name, **changes):
    state, _ = reference(name)
    net = network(NETWORKS[name], state)
    for key, value in changes.items():
        setattr(net, key, value)
    path.write_bytes(pickled(release(net)))
    return path


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_published_networks_come_back_with_equal_outputs(name, tmp_path):
    os.environ.pop("EXECUTED", None)
    path = written(tmp_path / f"{name}.pkl", name)
    _, inputs = reference(name)
    denoiser = diffdistill.load_denoiser(path)
    labels = inputs["class_labels"].argmax(1) if "class_labels" in inputs else None
    assert "EXECUTED" not in os.environ
    assert denoiser.num_classes == NETWORKS[name]["label_dim"] and denoiser.data_shape == (3, 8, 8)
    with torch.no_grad():
        result = denoiser(inputs["x"], inputs["sigma"], labels)
    torch.testing.assert_close(result, inputs["denoised"], rtol=1e-4, atol=1e-5)

    save_denoiser(denoiser, tmp_path / "ours.safetensors")
    again = diffdistill.load_denoiser(tmp_path / "ours.safetensors")
    with torch.no_grad():
        assert torch.equal(again(inputs["x"], inputs["sigma"], labels), result)
    assert again.config["provenance"]["found"].startswith("EDM pickle")


def test_the_description_and_the_range_of_noise_levels(tmp_path):
    found = read_foreign(written(tmp_path / "x.pkl", "ddpmpp_edm_cond"))
    assert found.kind == "edm"
    expected = "EDM pickle: SongUNet in EDMPrecond, 3x8x8, 4 classes, sigma 0.002 to 80"
    assert found.description == expected + ALWAYS_LABELLED
    assert (found.denoiser.sigma_min, found.denoiser.sigma_max) == (0.002, 80.0)
    settings = {**NETWORKS["ddpmpp_edm_cond"], "label_dropout": 0.1}
    (tmp_path / "x.pkl").write_bytes(pickled(release(network(settings, reference("ddpmpp_edm_cond")[0]))))
    assert read_foreign(tmp_path / "x.pkl").description == expected
    found = read_foreign(written(tmp_path / "x.pkl", "ncsnpp_ve_uncond"))
    assert "labels" not in found.description
    assert (found.denoiser.sigma_min, found.denoiser.sigma_max) == (0.02, 100.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dim": 5}, "another architecture|another shape"),
        ({"img_channels": 10**6}, "img_channels is 1000000"),
        ({"img_resolution": 16}, "another architecture"),
        ({"sigma_data": float("nan")}, "sigma_data is nan"),
        ({"sigma_data": "x"}, "sigma_data is x"),
    ],
)
def test_a_pickle_that_contradicts_itself_is_refused(changes, message, tmp_path):
    with pytest.raises(ForeignFileError, match=message):
        read_foreign(written(tmp_path / "x.pkl", "ddpmpp_edm_cond", **changes))


def test_an_enormous_network_is_refused_before_it_is_built(tmp_path):
    state, _ = reference("ddpmpp_edm_cond")
    for changes in ({"model_channels": 60_000}, {"num_blocks": 60_000}):
        net = network({**NETWORKS["ddpmpp_edm_cond"], **changes}, state)
        (tmp_path / "x.pkl").write_bytes(pickled(release(net)))
        with pytest.raises(ForeignFileError, match="another architecture|is refused"):
            read_foreign(tmp_path / "x.pkl")


def test_other_classes_are_refused_by_name(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickled({"ema": Persistent("StyleGAN")}))
    with pytest.raises(ForeignFileError, match="StyleGAN: choose one of EDMPrecond"):
        read_foreign(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickled({"weights": [1]}))
    with pytest.raises(ForeignFileError, match="it holds weights"):
        read_foreign(tmp_path / "x.pkl")


def test_a_network_within_itself_is_refused(tmp_path):
    state, _ = reference("ddpmpp_edm_cond")
    net = network(NETWORKS["ddpmpp_edm_cond"], state)
    part = net._modules["model"]._modules["map_layer0"]
    part._modules["twice"] = net._modules["model"]._modules["map_layer1"]
    (tmp_path / "x.pkl").write_bytes(pickled({"ema": net}))
    with pytest.raises(ForeignFileError, match="nested in itself"):
        read_foreign(tmp_path / "x.pkl")


def test_an_official_predictor_comes_back_with_equal_outputs(tmp_path):
    arrays = np.load(DATA / "predictor.npz", allow_pickle=False)
    settings = {"dataset_name": "cifar10", "num_steps": 4, "sampler_stu": "ipndm", "sampler_tea": "ipndm", "afs": True}
    bounds = {"scale_dir": 0.01, "scale_time": 0.2}
    predictor = Persistent("AMED_predictor", **bounds, **settings, schedule_rho=7)
    for name in arrays.files:
        if "." in name:
            add(predictor, name, torch.from_numpy(arrays[name]))
    predictor._modules["sigmoid"] = torch.nn.Sigmoid()
    (tmp_path / "x.pkl").write_bytes(pickled({"model": predictor}))
    found = read_foreign(tmp_path / "x.pkl")
    assert found.kind == "amed-predictor" and found.denoiser is None
    assert found.settings["num_steps"] == 4 and found.settings["afs"] is True
    values = {name: torch.from_numpy(np.asarray(arrays[name])).float() for name in ("features", "sigma", "sigma_next")}
    with torch.no_grad():
        correction = found.other(values["features"], values["sigma"], values["sigma_next"])
    for name in ("r", "scale_dir", "scale_time"):
        np.testing.assert_allclose(getattr(correction, name), arrays[name][:, 0], rtol=1e-5)
    with pytest.raises(ValueError, match="AMED predictor for cifar10"):
        diffdistill.load_denoiser(tmp_path / "x.pkl")
