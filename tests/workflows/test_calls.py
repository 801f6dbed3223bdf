"""The one-call functions: data and models in every form, measures, callbacks, names that users register."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill import (
    distill_guidance,
    evaluate,
    load_data,
    load_denoiser,
    register_data,
    register_metric,
    register_solver,
    sample,
    train_teacher,
    wrap,
)
from diffdistill.data import DATA_SETS, as_data
from diffdistill.metrics import MEASURES
from diffdistill.models import GaussianMixture
from diffdistill.solvers import SOLVERS, Euler, make_schedule, make_solver
from diffdistill.solvers import sample as along
from diffdistill.training import Callback
from diffdistill.training.noise_levels import noise_levels_of
from diffdistill.workflows.borrowing import borrowed
from tests.builders import tiny_denoiser
from tests.models.own.networks import Points

FAST = {"updates": 3, "batch_size": 8, "warmup": 1, "log_every": 1, "device": "cpu", "precision": "fp32"}
X, Y = torch.linspace(-1, 1, 7 * 2 * 3 * 5).view(7, 2, 3, 5), torch.arange(7) % 3


class Pairs:
    """A data set of another library: pairs of a tensor and a label."""

    def __init__(self, x=X, y=Y, **known):
        self.x, self.y = x, y
        self.__dict__.update(known)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


class Dicts(Pairs):
    def __getitem__(self, index):
        return {"x": self.x[index], "y.text": torch.ones(4)}


FORMS = {
    "a tensor": (lambda: X, 0),
    "a pair": (lambda: (X, Y), 3),
    "a dict": (lambda: {"x": X, "y": Y}, 3),
    "a list of tensors": (lambda: list(X), 0),
    "pairs with classes": (lambda: Pairs(classes=["a", "b", "c", "d"]), 4),
    "pairs with targets": (lambda: Pairs(targets=Y.tolist()), 3),
    "pairs of torch": (lambda: Pairs(num_classes=5), 5),
    "dicts": (lambda: Dicts(), 0),
    "doubles": (lambda: X.double(), 0),
    "a torch data set": (lambda: torch.utils.data.TensorDataset(X), 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_in_every_form_are_the_same(form):
    make, classes = FORMS[form]
    data = as_data(make())
    assert (data.shape, len(data), data.num_classes) == ((2, 3, 5), 7, classes)
    item = data[4]
    torch.testing.assert_close(item["x"], X[4])
    assert item["x"].dtype == torch.float32
    assert ("y" in item) != any(name.startswith("y.") for name in item)
    if classes:
        assert item["y"].dtype == torch.long and int(item["y"]) == int(Y[4])
    assert data.stack(range(2, 5))["x"].shape == (3, 2, 3, 5)
    assert as_data(data) is data


def test_a_folder_is_brought_to_the_shape_of_the_model(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((12, 16, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert as_data(tmp_path, shape=(3, 8, 8)).shape == (3, 8, 8)
    assert as_data(str(tmp_path)).shape[1:] == (12, 16)


BAD = {
    "bytes": (lambda: (X * 100).to(torch.uint8), ValueError, "samples are floats, such as x / 127.5 - 1 of bytes"),
    "lengths": (lambda: (X, Y[:3]), ValueError, r"as many conditions, not x \[7, 2, 3, 5\], y \[3\]"),
    "no samples": (lambda: {"images": X}, ValueError, "without samples x: it holds images"),
    "labels that are floats": (lambda: (X, Y.float()), ValueError, "labels are integers from 0, or -1 for none"),
    "no number of classes": (Pairs, ValueError, "does not say of how many classes"),
    "an empty set": (lambda: [], ValueError, "data set is empty"),
    "texts": (lambda: ["a", "b"], ValueError, r"pairs \(tensor, label\) or dicts with x, not str"),
    "nothing": (lambda: 7, TypeError, "data are a tensor"),
    "no such path": (lambda: "no/such/folder", FileNotFoundError, "no data at 'no/such/folder'"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_are_none_say_why(case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        as_data(make())


def test_one_function_samples_from_noise_and_from_seeds():
    model = tiny_denoiser()
    noise, label = torch.randn(5, 2, 8, 8), torch.arange(5) % 4
    solver, sigmas = make_solver("dpmpp", order=2), make_schedule("cosine", num_steps=3, sigma_min=0.0, sigma_max=80.0)
    expected = along(model, noise, solver=solver, sigmas=sigmas, cond=label)
    for options in (
        {"solver": solver, "sigmas": sigmas},
        {"solver": solver, "num_steps": 3},
        {"solver": {"name": "dpmpp", "order": 2}, "sigmas": sigmas},
    ):
        torch.testing.assert_close(sample(model, noise, cond=label, **options), expected, rtol=0, atol=0)
    whole = sample(model, 5, num_steps=2, seed=3)
    torch.testing.assert_close(sample(model, 3, num_steps=2, seed=5, cond=[2, 3, 0], batch_size=2), whole[2:])
    assert sample(model, noise, num_steps=2, w=1.0, cond=label, return_trajectory=True).nfe == 4
    mixture = GaussianMixture(weights=[1.0], means=[[0.5, -0.5]], variances=[0.01])
    assert sample(mixture, torch.randn(4, 2), num_steps=8).sub(torch.tensor([0.5, -0.5])).abs().max() < 0.5
    for options, message in (({"num_steps": 2, "sigmas": sigmas}, "leave out num_steps"), ({}, "num_steps is missing")):
        with pytest.raises(ValueError, match=message):
            sample(model, noise, cond=label, **options)
    with pytest.raises(ValueError, match="return_trajectory is for noise that is given as a tensor"):
        sample(model, 3, num_steps=2, return_trajectory=True)


def test_a_model_by_its_name_is_sampled_and_measured():
    x = sample("digits-student-4", 40, w=1.0)
    assert x.shape == (40, 1, 8, 8)
    data = load_data("digits", split="test")
    found = evaluate("digits-student-4", data, num_samples=80, w=1.0, measures=["fid", "kid"], features="pixels_8x8")
    stored = evaluate(sample("digits-student-4", 80, w=1.0), data, measures=["fid", "kid"], features="pixels_8x8")
    assert found["fid"].value == pytest.approx(stored["fid"].value, rel=1e-4)
    noise = evaluate(torch.randn(80, 1, 8, 8).clamp(-1, 1), data, features="pixels_8x8")
    assert stored["fid"].value < 0.5 * noise["fid"].value
    points = evaluate(torch.rand(50, 3), torch.rand(60, 3), features="pixels")
    assert 0 < points["fid"].value < 0.1


@pytest.fixture
def names():
    """Names that a test registers are forgotten after it."""
    before = [(table, dict(table)) for table in (DATA_SETS, MEASURES, SOLVERS)]
    yield
    for table, old in before:
        table.clear()
        table.update(old)


def test_names_of_users_stand_beside_ours(names):
    @register_data("ramp")
    def ramp(*, count: int = 7):
        return X[:count], Y[:count]

    @register_solver("mine")
    class Mine(Euler):
        pass

    @register_metric("mean_gap", better="lower")
    def mean_gap(samples, reference):
        return (samples.mean(0) - reference.mean(0)).abs().max()

    assert len(load_data("ramp", count=5)) == 5 and load_data("ramp").num_classes == 3
    model, noise = tiny_denoiser(), torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(sample(model, noise, solver="mine", num_steps=2), sample(model, noise, num_steps=2))
    found = evaluate(X + 0.0, {"name": "ramp"}, measures=["mean_gap"], splits=1)
    assert found["mean_gap"].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(TypeError, match="has no option 'size': it takes count"):
        load_data("ramp", size=3)
    for register, name in (
        (register_data, "digits"),
        (register_solver, "euler"),
        (lambda n: register_metric(n, better="lower"), "fid"),
    ):
        with pytest.raises(ValueError, match=f"name '{name}' is taken: choose another"):
            register(name)(Mine)
    with pytest.raises(ValueError, match="is a word"):
        register_data("two words")(ramp)
    with pytest.raises(TypeError, match="must be a class that extends"):
        register_solver("other")(ramp)
    with pytest.raises(ValueError, match="unknown direction 'down': choose one of higher, lower"):
        register_metric("other", better="down")
    register_data("ramp")(ramp)  # a cell that is run again


def test_callbacks_hear_of_updates_of_the_log_and_of_the_end(tmp_path):
    heard = []

    class Listener(Callback):
        def on_update(self, trainer):
            heard.append(trainer.update)

        def on_end(self, trainer):
            heard.append("end")

    def log(trainer, record):
        heard.append(record["loss"])

    model = wrap(Points(), "flow", data_shape=(2,))
    train_teacher(model, torch.randn(9, 2), trainer={**FAST, "log_every": 2}, callbacks=[Listener(), log])
    assert [type(entry) for entry in heard] == [int, float, int, float, int, str] or heard[-1] == "end"
    assert [entry for entry in heard if isinstance(entry, int)] == [1, 2, 3] and len(heard) == 6
    with pytest.raises(TypeError, match=r"callbacks are training.Callback objects, or functions"):
        train_teacher(model, torch.randn(9, 2), trainer=FAST, callbacks=["print"])


def test_a_config_is_built_for_the_data_and_trained():
    config = {
        key: value
        for key, value in tiny_denoiser().config.items()
        if key not in ("data_shape", "num_classes", "provenance")
    }
    config["network"] = {
        k: v for k, v in config["network"].items() if k not in ("img_channels", "img_resolution", "label_dim")
    }
    data = torch.rand(9, 1, 8, 8) * 2 - 1, torch.arange(9) % 2
    teacher = train_teacher(config, data, trainer=FAST)
    assert teacher.data_shape == (1, 8, 8) and teacher.num_classes == 2


def test_noise_levels_stay_within_the_range_of_the_model():
    teacher = wrap(
        Points(num_labels=3),
        "eps",
        betas=torch.linspace(0.01, 0.3, 25),
        data_shape=(2,),
        num_classes=2,
        null_label=2,
        w_into="time_mlp",
    )
    assert teacher.sigma_max < 9
    draws = noise_levels_of(teacher)(4000, torch.Generator().manual_seed(0))
    assert teacher.sigma_min <= draws.min() and 0.9 * teacher.sigma_max < draws.max() <= teacher.sigma_max * (1 + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            None,
            {"name": "cosine", "sigma_max": None},
            {"name": "cosine", "sigma_max": teacher.sigma_max},
            {"name": "lognormal"},
        ):
            noise_levels_of(teacher, options)
    for options in ({"name": "cosine", "sigma_max": 80.0}, {"name": "on_schedule", "sigmas": [80.0, 1.0, 0.0]}):
        with pytest.warns(UserWarning, match=r"lie outside those of the model, .*, which it was not trained on"):
            noise_levels_of(teacher, options)
    with pytest.warns(UserWarning, match="outside those of the model"):
        distill_guidance(
            teacher,
            (torch.randn(9, 2), torch.arange(9) % 2),
            trainer=FAST,
            noise_levels={"name": "cosine", "sigma_max": 80.0},
        )


def test_what_cannot_be_distilled_says_why():
    data = torch.randn(9, 2), torch.arange(9) % 2
    plain = wrap(Points(), "flow", data_shape=(2,))
    labelled = wrap(Points(num_labels=2), "flow", data_shape=(2,), num_classes=2, w_into="time_mlp")
    guided = wrap(Points(num_labels=3), "flow", data_shape=(2,), num_classes=2, null_label=2)
    cases = [
        (plain, data, ValueError, "takes no condition, so that no w guides it"),
        (labelled, data, ValueError, "knows no label for no class"),
        (guided, torch.randn(9, 3), ValueError, r"samples \[3\] of 0 classes, but the model takes \[2\] of 2"),
        (Points(), data, TypeError, "make a network a denoiser by diffdistill.wrap"),
        (guided, data, ValueError, "enters this network is not known: name a module"),
        ("no-such-model", data, ValueError, "unknown model 'no-such-model'"),
    ]
    for teacher, given, kind, message in cases:
        with pytest.raises(kind, match=message):
            distill_guidance(teacher, given, trainer=FAST)


def test_a_model_is_given_back_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(False)
    strides = [p.stride() for p in model.parameters()]

    def fail():
        with borrowed(model):
            model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert [p.stride() for p in model.parameters()] == strides


def test_a_shipped_model_is_named_in_the_call(tmp_path):
    data = load_data("digits", split="test")
    student = distill_guidance("digits-teacher", data, w_range=1.0, out=tmp_path, trainer=FAST)
    assert student.w_range == (1.0, 1.0)
    loaded = load_denoiser(tmp_path)
    assert loaded.config["provenance"]["command"] == "diffdistill.distill_guidance"
    assert math.isfinite(loaded.config["provenance"]["metrics"]["loss"])
    again = distill_guidance("digits-teacher", data, w_range=1.0, out=tmp_path, trainer=FAST)
    torch.testing.assert_close(again.state_dict(), student.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"holds another run: w_range was"):
        distill_guidance("digits-teacher", data, w_range=2.0, out=tmp_path, trainer=FAST)
