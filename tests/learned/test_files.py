"""Learned solvers as files: what is written is read back, and anything else is refused with a reason."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from diffdistill.learned import (
    LearnedSampler,
    LearnedSchedule,
    identity,
    load_predictor,
    make_learned,
    make_task,
    save_predictor,
    trained,
)
from diffdistill.learned.storage import PREDICTOR
from diffdistill.models import ClassifierFreeGuidance, GaussianMixture, guided
from diffdistill.solvers import GaussianStart, GaussianStatistics, make_schedule, save_gaussian
from tests.builders import tiny_denoiser

SCHEDULE = {"name": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0}
FORMS = {
    "amed": ({"afs": True}, {"name": "amed", "scale_dir": 0.1, "scale_time": 0.0}, 5),
    "plugin": ({"name": "dpmpp", "order": 2, "afs": True}, {"name": "table", "scale_first": 0.3}, 5),
    "steps": ({"name": "deis", "order": 3, "afs": True}, {"name": "table", "scale_dir": 0.9}, 2),
    "linear": ({"name": "ipndm", "order": 3, "afs": True}, {"name": "linear", "lags": 2, "sum_to_zero": True}, 2),
}


def make(form="plugin", **changes):
    torch.manual_seed(0)
    inner, predictor, _ = FORMS[form]
    learned = make_learned(
        form, inner=inner, predictor=predictor, sigmas=make_schedule(**SCHEDULE, num_steps=3), **changes
    )
    with torch.no_grad():
        for parameter in learned.solver.predictor.parameters():
            parameter.normal_(std=0.3)
    return learned


def start(denoiser):
    return torch.randn(3, *denoiser.data_shape), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form, tmp_path):
    denoiser = tiny_denoiser()
    learned = make(form, trained_for=identity(denoiser), provenance={"command": "train"})
    path = tmp_path / "predictor.safetensors"
    save_predictor(learned, path)
    assert path.stat().st_size < 64 * 1024
    again = load_predictor(tmp_path if form == "amed" else path)
    assert (again.nfe, again.num_steps, again.form) == (FORMS[form][2], 3, form)
    assert again.provenance == {"command": "train"}
    noise, cond = start(denoiser)
    run = again.sample(denoiser, noise, cond, return_trajectory=True)
    assert run.nfe == again.nfe
    torch.testing.assert_close(run.x, learned.sample(denoiser, noise, cond, return_trajectory=True).x, rtol=0, atol=0)


def test_the_wrong_denoiser_weight_or_number_of_steps_is_refused():
    denoiser = tiny_denoiser()
    noise, cond = start(denoiser)
    learned = make(trained_for=identity(denoiser))
    with pytest.raises(ValueError, match="fingerprint"):
        learned.sample(tiny_denoiser(seed=1), noise, cond)
    with pytest.raises(ValueError, match=r"with w None, but this one has 1\.0"):
        learned.sample(guided(denoiser, 1.0), noise, cond)
    with pytest.raises(ValueError, match=r"trained for 3 steps \(5 evaluations\)"):
        learned.check(denoiser, num_steps=4)
    for w in (None, 0.0):  # which guide nothing
        make(trained_for={**identity(denoiser), "w": w}).check(guided(denoiser, 0.0))
    at_one = make(trained_for=identity(guided(denoiser, 1.0)))
    at_one.check(ClassifierFreeGuidance(denoiser, 1))
    with pytest.raises(ValueError, match=r"w 1\.0"):
        at_one.check(guided(denoiser, 2.0))
    with pytest.raises(ValueError, match="per sample"):
        identity(guided(denoiser, torch.ones(3)))
    from diffdistill.solvers import sample

    with pytest.raises(ValueError, match="3 intervals, but the schedule has 5"):
        sample(denoiser, noise, solver=learned.solver, sigmas=make_schedule(**SCHEDULE, num_steps=5), cond=cond)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "predictor.safetensors"
    save_predictor(make("amed"), path)
    whole = path.read_bytes()
    for size in (0, 7, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="whole safetensors"):
            load_predictor(path)
    path.write_bytes(whole)
    state = load(whole)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[PREDICTOR.key])

    def rewritten(metadata, tensors=state):
        save_file(tensors, path, metadata=metadata)
        return path

    with pytest.raises(ValueError, match="no predictor"):
        load_predictor(rewritten({"other": "x"}))
    with pytest.raises(ValueError, match="damaged"):
        load_predictor(rewritten({PREDICTOR.key: "{"}))
    for changes, message in (
        ({"format": 2}, "format 2"),
        ({"nfe": 6}, "states 6"),
        ({"form": "heun"}, "amed, linear, plugin, steps"),
        ({"predictor": {"name": "amed", "scale_dir": 2.0}}, r"\[0, 1\)"),
        ({"sigmas": [1.0, 2.0]}, "decrease"),
        ({"predictor": {"name": "table", "num_intervals": 10**15}}, "make 3 intervals"),
        ({"predictor": {"name": "linear", "lags": 10**15}}, "no more than 3 answers"),
        ({"predictor": {"name": "amed", "initial_r": [0.5] * 9}}, "for 9 intervals: the noise levels make 3"),
        ({"thresholding": "static"}, "unknown thresholding 'static'"),
        ({"extra": 1}, "builds no solver"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor(rewritten({PREDICTOR.key: json.dumps({**record, **changes})}))
    fewer = {name: value for name, value in state.items() if name != "fc_r.bias"}
    with pytest.raises(ValueError, match=r"missing, first fc_r\.bias"):
        load_predictor(rewritten({PREDICTOR.key: json.dumps(record)}, fewer))
    with pytest.raises(ValueError, match="unknown predictor"):
        load_predictor("no-such-predictor")


def test_what_was_trained_is_what_is_kept():
    denoiser = tiny_denoiser()
    learned = make("steps")
    schedule = LearnedSchedule(learned.sigmas)
    with torch.no_grad():
        schedule.logits.normal_()
    result = trained(learned, LearnedSampler(learned.solver.predictor, schedule), denoiser, {"seconds": 1})
    assert torch.equal(result.sigmas, schedule().detach()) and result.trained_for == identity(denoiser)
    with pytest.raises(ValueError, match="use endpoint"):
        make_task(learned, denoiser, SCHEDULE, name="stepwise", teacher={"name": "heun"}, points=1)
    started = make("amed", start={"statistics": "digits-teacher", "sigma": 8.0})
    with pytest.raises(ValueError, match="not from an analytic start: use endpoint"):
        make_task(started, denoiser, SCHEDULE, name="stepwise", teacher={"name": "heun"}, points=1)
    with pytest.raises(TypeError, match="no option 'pionts'"):
        make_task(make("amed"), denoiser, SCHEDULE, name="stepwise", teacher={"name": "heun"}, pionts=1)


def test_an_analytic_start_is_recorded_trained_with_and_used(tmp_path):
    model = GaussianMixture(weights=[0.6, 0.4], means=torch.randn(2, 2, 3, 5), variances=[0.2, 0.3])
    data = model.sample_data(400, generator=torch.Generator().manual_seed(0))
    statistics = GaussianStatistics.fit(data)
    save_gaussian(statistics, tmp_path / "statistics.safetensors")
    learned = make_learned(
        "steps",
        inner={"name": "dpmpp", "order": 2, "afs": "gaussian"},
        predictor={"name": "table"},
        sigmas=make_schedule("polynomial", num_steps=3, sigma_min=0.05, sigma_max=8.0),
        start={"statistics": str(tmp_path / "statistics.safetensors"), "sigma": 8.0},
    )
    fine = {"name": "polynomial", "num_steps": 30}
    task = make_task(
        learned, model, {}, name="endpoint", teacher={"name": "heun"}, teacher_schedule=fine, trajectories=6
    )
    columns = task.data.tensors()
    save_predictor(learned, tmp_path / "predictor.safetensors")
    again = load_predictor(tmp_path / "predictor.safetensors")
    run = again.sample(model, columns["noise"], return_trajectory=True)
    assert run.nfe == again.nfe == 2
    begun, _ = GaussianStart(statistics, 8.0).begin(model, columns["noise"], again.sigmas)
    torch.testing.assert_close(run.x[0], begun)
    assert not torch.allclose(run.x[0], 8 * columns["noise"], rtol=1e-3)
    error = (run.x[-1] - columns["target"]).flatten(1).norm(dim=1).mean().item()
    assert task.objective.loss(columns, torch.Generator()).value.item() == pytest.approx(error, rel=1e-4)
