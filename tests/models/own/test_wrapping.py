"""Any network as a denoiser: conventions against closed forms, guidance input, files, and what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from diffdistill import load_denoiser, register_network, sample, save_denoiser, wrap
from diffdistill.models import GuidanceConditioned, build_denoiser, guidance_student
from diffdistill.models.acceleration import Compiled
from diffdistill.models.building import NETWORKS
from diffdistill.models.own.registration import REGISTERED
from diffdistill.solvers import make_schedule, make_solver
from tests.models.own.networks import Net, Points

BETAS = torch.linspace(1e-4, 0.06, 50, dtype=torch.float64)
SHAPE = (2, 6, 7)


@pytest.fixture
def registered():
    """Names that a test registers are forgotten after it."""
    before = dict(NETWORKS), dict(REGISTERED)
    yield
    for table, old in zip((NETWORKS, REGISTERED), before, strict=True):
        table.clear()
        table.update(old)


def own(net=None, **options):
    torch.manual_seed(0)
    net = Net(num_labels=4) if net is None else net
    given = {"betas": BETAS, "data_shape": SHAPE, "num_classes": 3, "null_label": 3, "w_into": "time_mlp"}
    return wrap(net, "eps", **{**given, "bottleneck": "mid", **options})


def inputs(denoiser, batch=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *denoiser.data_shape, generator=generator)
    sigma = torch.linspace(0.3, 3.0, batch, dtype=torch.float64)
    return x, sigma, torch.arange(batch) % 4 - 1


class Answer(nn.Module):
    """Answers what is right for data that is one point, and keeps the times that it was given."""

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.times = answer, []

    def forward(self, x, t):
        self.times.append(t)
        return self.answer(x, t) + self.weight


POINT = torch.linspace(-1, 1, 5)
ALPHAS = torch.cumprod(1 - BETAS, 0)
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def vp(x, t):
    """Signal level, noise level, and noise at index t."""
    alpha = ALPHAS.float()[t.round().long()].sqrt()[:, None]
    sigma = (1 - alpha**2).sqrt()
    return alpha, sigma, (x - alpha * POINT) / sigma


def v_of(x, t):
    alpha, sigma, eps = vp(x, t)
    return alpha * eps - sigma * POINT


CONVENTIONS = {
    "eps": ({"betas": BETAS}, lambda x, t: vp(x, t)[2]),
    "v": ({"alphas_cumprod": ALPHAS}, v_of),
    "x0": ({"sigmas": SIGMAS.tolist()}, lambda x, t: POINT.expand_as(x)),
    "flow": ({}, lambda x, t: (x - POINT) / t[:, None]),
    "edm": ({"sigma_data": 0.7}, lambda x, t: edm_of(x, t)),
    "denoised": ({}, lambda x, t: POINT.expand_as(x)),
}


def edm_of(x, t):
    sigma = (4 * t[:, None]).exp()
    scale = (sigma**2 + 0.7**2).sqrt()
    return (POINT - 0.7**2 / scale * x) * scale / (0.7 * sigma)


@pytest.mark.parametrize("prediction", CONVENTIONS)
def test_every_prediction_of_a_known_point_denoises_to_it(prediction):
    options, answer = CONVENTIONS[prediction]
    denoiser = wrap(Answer(answer), prediction, data_shape=(5,), **options)
    sigma = SIGMAS[[3, 20, 49]]
    x = POINT + sigma[:, None].float() * torch.randn(3, 5)
    torch.testing.assert_close(denoiser(x, sigma), POINT.expand(3, 5), atol=1e-4, rtol=0)


def test_the_time_is_an_index_an_integer_or_a_share():
    between = (SIGMAS[7] * SIGMAS[8]).sqrt().view(1)
    x = torch.zeros(1, 5)
    for time, level, expected in (("index", between, 7.5), ("integer", SIGMAS[7:8], 7), ("unit", between, 0.15)):
        net = Answer(lambda x, t: x)
        wrap(net, "eps", betas=BETAS, data_shape=(5,), time=time)(x, level)
        assert net.times[-1].tolist() == pytest.approx([expected], rel=1e-5)
        assert net.times[-1].is_floating_point() == (time != "integer")
    for time, expected in (("unit", 0.8), ("index", 800.0)):
        net = Answer(lambda x, t: x)
        wrap(net, "flow", data_shape=(5,), time=time)(x, torch.tensor([4.0]))
        assert net.times[-1].tolist() == pytest.approx([expected])


def test_the_ends_are_those_of_the_network():
    denoiser = own()
    assert (denoiser.sigma_min, denoiser.sigma_max) == pytest.approx((SIGMAS[0].item(), SIGMAS[-1].item()))
    assert own(sigma_min=0.1).sigma_min == 0.1
    assert wrap(Points(), "flow", data_shape=(2,)).sigma_max == pytest.approx(999)


def test_labels_reach_the_network_with_its_own_null():
    seen = []
    net = Net(num_labels=4)
    denoiser = own(net, call=lambda net, x, t, cond: (seen.append(cond), net(x, t, y=cond))[1])
    x, sigma, y = inputs(denoiser)
    plain = denoiser(x, sigma, y)
    assert seen[-1].tolist() == [3, 0, 1, 2, 3]
    denoiser(x, sigma, None)
    assert seen[-1].tolist() == [3] * 5
    one_hot = nn.functional.one_hot
    again = own(net, call=lambda net, x, t, c: net(x, t, one_hot(c, 4).argmax(1)))
    torch.testing.assert_close(again(x, sigma, y), plain)
    unlabelled = own(Net(), num_classes=0, null_label=None)
    assert not unlabelled.conditional
    unlabelled.check_condition(None, 5)


def test_without_a_null_label_it_is_conditional_alone():
    denoiser = own(Net(num_labels=3), null_label=None)
    x, sigma, y = inputs(denoiser)
    denoiser(x, sigma, y.clamp(min=0))
    for cond in (y, None):
        with pytest.raises(ValueError, match="knows no label for no class.*null_label"):
            denoiser.check_condition(cond, 5)
    with pytest.raises(ValueError, match="null_label"):
        denoiser.null_condition(y)


def assert_w_counts(student):
    """The weight enters, and gradients reach what takes it."""
    x, sigma, y = inputs(student)
    with torch.no_grad():
        student.model.w_input.map.weight.normal_()
    low, high = (GuidanceConditioned(student, w)(x, sigma, y) for w in (0.5, 2.0))
    assert not torch.allclose(low, high)
    mixed = GuidanceConditioned(student, torch.tensor([0.5, 2.0, 0.5, 2.0, 2.0]))(x, sigma, y)
    torch.testing.assert_close(mixed[[0, 2]], low[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3, 4]], high[[1, 3, 4]])
    mixed.sum().backward()
    assert student.model.w_input.map.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("into", ["time_mlp", "time_mlp.2", "down.conv1", "mid"])
def test_a_student_begins_as_its_teacher_and_takes_w(into):
    teacher = own(w_into=into)
    state = copy.deepcopy(teacher.state_dict())
    student = guidance_student(teacher, (0.0, 4.0))
    x, sigma, y = inputs(teacher)
    torch.testing.assert_close(GuidanceConditioned(student, 3.0)(x, sigma, y), teacher(x, sigma, y), rtol=0, atol=0)
    assert_w_counts(student)
    torch.testing.assert_close(teacher.state_dict(), state, rtol=0, atol=0)
    assert teacher.model.w_input is None and not teacher.model.net.time_mlp._forward_hooks


def test_the_guidance_input_survives_copies_and_compilation():
    student = guidance_student(own(), (0.0, 4.0))
    x, sigma, y = inputs(student)
    with torch.no_grad():
        student.model.w_input.map.weight.normal_()
    first = copy.deepcopy(student)
    GuidanceConditioned(student, torch.ones(5, requires_grad=True) * 1)(x, sigma, y)
    second = copy.deepcopy(student)
    expected = GuidanceConditioned(student, 2.5)(x, sigma, y)
    for copied in (first, second):
        torch.testing.assert_close(GuidanceConditioned(copied, 2.5)(x, sigma, y), expected)
        assert_w_counts(copied)
    torch.testing.assert_close(GuidanceConditioned(student, 2.5)(x, sigma, y), expected)
    fast = Compiled(GuidanceConditioned(student, 2.5), backend="aot_eager")
    torch.testing.assert_close(fast(x, sigma, y), expected)
    torch.testing.assert_close(
        Compiled(GuidanceConditioned(student, 1.0), backend="aot_eager")(x, sigma, y),
        GuidanceConditioned(student, 1.0)(x, sigma, y),
    )


def test_a_registered_network_is_built_again_from_its_file(tmp_path, registered):
    @register_network("mine", call=lambda net, x, t, cond: 2 * net(x, t, cond), bottleneck="mid", w_into="time_mlp")
    class Mine(Net):
        def __init__(self, width, *, labels=4):
            super().__init__(width=width, num_labels=labels)

    teacher = own(Mine(6), bottleneck=None, w_into=None)
    student = guidance_student(teacher, (0.0, 4.0))
    with torch.no_grad():
        student.model.w_input.map.weight.normal_()
    x, sigma, y = inputs(teacher)
    for model, w in ((teacher, None), (student, torch.full((5,), 1.5))):
        save_denoiser(model, tmp_path / "model.safetensors")
        loaded = load_denoiser(tmp_path)
        torch.testing.assert_close(loaded(x, sigma, y, w), model(x, sigma, y, w), rtol=0, atol=0)
        assert loaded.bottleneck is loaded.model.net.mid and loaded.config == {**model.config, "provenance": None}
        assert loaded.config["network"] == {"name": "mine", "width": 6, "labels": 4}
    built = build_denoiser({**teacher.config, "network": {"name": "mine", "width": 4}})
    assert built.model.net.width == 4 and built.model.null_label == 3

    del NETWORKS["mine"], REGISTERED["mine"]
    with pytest.raises(ValueError, match=r"holds the network 'mine', which is not registered here.*plugins=\[MODULE\]"):
        load_denoiser(tmp_path)


def test_a_network_without_a_name_is_loaded_by_wrapping_a_fresh_one(tmp_path):
    student = guidance_student(own(), (0.0, 4.0))
    with torch.no_grad():
        student.model.w_input.map.weight.normal_()
    save_denoiser(student, tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match=r"'Net' that has no registered name.*wrap\(net, weights=FILE\)"):
        load_denoiser(tmp_path / "student.safetensors")
    loaded = wrap(Net(num_labels=4), weights=tmp_path / "student.safetensors")
    x, sigma, y = inputs(student)
    w = torch.linspace(0, 4, 5)
    torch.testing.assert_close(loaded(x, sigma, y, w), student(x, sigma, y, w), rtol=0, atol=0)
    assert loaded.w_range == (0.0, 4.0) and not loaded.training
    with pytest.raises(ValueError, match="another architecture"):
        wrap(Net(num_labels=4, width=6), weights=tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="says what prediction is: leave prediction, betas out"):
        wrap(Net(num_labels=4), "eps", betas=BETAS, weights=tmp_path / "student.safetensors")


def test_a_call_that_no_file_holds_is_not_lost_in_silence(tmp_path, registered):
    @register_network("mine")
    class Mine(Net):
        pass

    model = own(Mine(num_labels=4), call=lambda net, x, t, cond: -net(x, t, cond))
    save_denoiser(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="called by a function that no file can hold"):
        load_denoiser(tmp_path)
    loaded = wrap(Mine(num_labels=4), weights=tmp_path, call=lambda net, x, t, cond: -net(x, t, cond))
    x, sigma, y = inputs(model)
    torch.testing.assert_close(loaded(x, sigma, y), model(x, sigma, y), rtol=0, atol=0)


def test_tied_weights_are_saved(tmp_path):
    net = Points(dim=16)
    net.mid.weight = net.inside.weight
    model = wrap(net, "flow", data_shape=(16,))
    save_denoiser(model, tmp_path / "model.safetensors")
    loaded = wrap(Points(dim=16), weights=tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


SCRIPT = """
import sys, torch
sys.path.insert(0, {folder!r})
import nets
from diffdistill import load_denoiser
model = load_denoiser({path!r})
print(model(torch.ones(3, 2), torch.tensor([0.5, 1.0, 2.0])).tolist())
"""


def test_a_fresh_process_loads_it_once_the_module_is_imported(tmp_path):
    source = (
        "import torch\nfrom torch import nn\nfrom diffdistill import register_network\n\n"
        '@register_network("line", time="unit")\nclass Line(nn.Module):\n'
        "    def __init__(self, dim: int = 2):\n        super().__init__()\n"
        "        self.map = nn.Linear(dim + 1, dim)\n\n"
        "    def forward(self, x, t):\n        return self.map(torch.cat([x, t[:, None]], dim=1))\n"
    )
    (tmp_path / "nets.py").write_text(source)
    path = tmp_path / "model.safetensors"
    make = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nets, torch, diffdistill; torch.manual_seed(0)\n"
        "model = diffdistill.wrap(nets.Line(), 'flow', data_shape=(2,))\n"
        f"diffdistill.save_denoiser(model, {str(path)!r})\n"
        "print(model(torch.ones(3, 2), torch.tensor([0.5, 1.0, 2.0])).tolist())"
    )
    scripts = (make, SCRIPT.format(folder=str(tmp_path), path=str(path)))
    made, loaded = (
        json.loads(subprocess.run([sys.executable, "-c", s], capture_output=True, text=True, check=True).stdout)
        for s in scripts
    )
    assert made == loaded


def test_it_is_sampled_by_any_solver():
    denoiser = own()
    noise = torch.randn(5, *SHAPE)
    sigmas = make_schedule("polynomial", num_steps=3, sigma_min=denoiser.sigma_min, sigma_max=denoiser.sigma_max)
    with torch.no_grad():
        x = sample(denoiser, noise, solver=make_solver("dpmpp", order=2), sigmas=sigmas, cond=torch.arange(5) % 3)
    assert x.shape == noise.shape and x.isfinite().all()


class Wide(Net):
    def forward(self, x, t, y=None):
        return torch.cat([super().forward(x, t, y)] * 2, dim=1)


class Tuple(Net):
    def forward(self, x, t, y=None):
        return (super().forward(x, t, y),)


BAD = {
    "another shape": (lambda: own(Wide(num_labels=4)), r"answers \[3, 4, 6, 7\] to samples \[3, 2, 6, 7\].*variance"),
    "a tuple": (lambda: own(Tuple(num_labels=4)), "answers tuple to samples.*sample"),
    "another data shape": (
        lambda: own(data_shape=(3, 6, 7)),
        "cannot be called as net.x, t, labels.: say how by call=.*channels",
    ),
    "a call that fails": (lambda: own(call=lambda net, x, t, c: net(x)), "cannot be called by your call .TypeError"),
    "a time table": (lambda: own(Net(num_labels=4, time_table=50)), 'time="integer"'),
    "a beta of 0": (lambda: own(betas=[0.1, 0.0, 0.2]), r"betas\[1\] = 0: betas lie in \(0, 1\)"),
    "alphas that rise": (
        lambda: own(betas=None, alphas_cumprod=[0.9, 0.7, 0.8]),
        r"alphas_cumprod\[2\] has no more noise",
    ),
    "no signal": (lambda: own(betas=None, alphas_cumprod=[0.9, 0.1, 0.0]), "without signal has no sigma"),
    "sigmas that fall": (lambda: own(betas=None, sigmas=[3.0, 2.0]), r"sigmas\[1\] has no more noise than sigmas\[0\]"),
    "no levels": (lambda: own(betas=None), "needs its noise levels in one form, betas, alphas_cumprod"),
    "two forms": (lambda: own(schedule="linear"), r"in one form.*\['betas', 'schedule'\] given"),
    "an unknown schedule": (lambda: own(betas=None, schedule="linaer"), "'linaer': choose one of iddpm, linear"),
    "levels of a flow": (
        lambda: wrap(Points(), "flow", data_shape=(2,), betas=BETAS),
        "continuous time: leave out betas",
    ),
    "an unknown prediction": (
        lambda: wrap(Points(), "noise", data_shape=(2,)),
        "'noise': choose one of denoised, edm, eps",
    ),
    "an unknown time": (lambda: own(time="float"), "'float': choose one of index, integer, unit"),
    "no shape": (lambda: own(data_shape=None), "wrap needs data_shape"),
    "a null outside": (lambda: own(null_label=4), "integer from 0 to num_classes=3, but is 4"),
    "a null outside the table": (
        lambda: own(Net(num_labels=3)),
        "null_label=3 is outside the network's table of 3 labels, 0 to 2",
    ),
    "a null of no classes": (lambda: own(num_classes=0), "takes no labels"),
    "an unknown w_into": (
        lambda: own(w_into="time_mpl"),
        "w_into='time_mpl' names no module of the network: near are time_mlp",
    ),
    "an unknown bottleneck": (lambda: own(bottleneck="middle"), "bottleneck='middle' names no module.*mid"),
    "no w_into": (lambda: guidance_student(own(w_into=None), (0, 1)), "name a module.*w_into"),
    "no parameters": (lambda: wrap(nn.Identity(), "flow", data_shape=(2,)), "Identity has no parameters"),
    "unused sigma_data": (lambda: own(sigma_data=0.3), "does not depend on it"),
    "bad sigmas": (lambda: own(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_wrapped_says_why(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_names_that_cannot_be_given_say_why(registered):
    @register_network("mine")
    class Mine(Net):
        pass

    for name, message in (
        ("mine", "'mine' is taken"),
        ("song_unet", "taken"),
        ("a b", "is a word"),
        ("unregistered", "stands for"),
    ):
        with pytest.raises(ValueError, match=message):
            register_network(name)(type("Other", (Net,), {}))
    with pytest.raises(ValueError, match="an option 'name'"):
        register_network("named")(type("Named", (Net,), {"__init__": lambda self, name: None}))
    with pytest.raises(ValueError, match="without a name"):
        register_network("open")(type("Open", (Net,), {"__init__": lambda self, *sizes: None}))

    @register_network("made")
    def made(width=8):
        return width

    with pytest.raises(TypeError, match="returned a int"):
        NETWORKS["made"]()
