"""Points, signals, images and video: from a teacher to a student of two steps, by every solver, through files."""

import copy

import pytest
import torch
from PIL import Image

import diffdistill
from diffdistill import distill_guidance, distill_steps, load_denoiser, sample, train_solver, train_teacher, wrap
from diffdistill.models import guidance_student
from diffdistill.solvers import SOLVERS
from diffdistill.training import Interrupted
from tests.models.own.networks import Net, Points

SHAPES = {"points": (2,), "signals": (2, 12), "images": (3, 6, 7), "video": (1, 3, 5, 6)}
BETAS = torch.linspace(1e-3, 0.2, 40)
FAST = {"updates": 3, "batch_size": 8, "warmup": 1, "sample_every": 2, "log_every": 1, "device": "cpu"}


def network(shape):
    torch.manual_seed(0)
    return Points(shape[0], num_labels=4) if len(shape) == 1 else Net(shape[0], len(shape) - 1, num_labels=4)


def denoiser(shape):
    options = {"num_classes": 3, "null_label": 3, "w_into": "time_mlp", "bottleneck": "mid"}
    return wrap(network(shape), "eps", betas=BETAS, data_shape=shape, **options)


def data_of(shape, count=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *shape, generator=generator).clamp(-1, 1), torch.arange(count) % 3


def state_of(module):
    grads = {name: p.requires_grad for name, p in module.named_parameters()}
    weights = copy.deepcopy(module.state_dict())
    return weights, grads, {name: part.training for name, part in module.named_modules()}


@pytest.mark.parametrize("kind", SHAPES)
def test_from_a_teacher_to_a_student_of_two_steps(kind, tmp_path):
    shape = SHAPES[kind]
    data, began = data_of(shape), denoiser(shape)
    before = state_of(began)
    teacher = train_teacher(began, data, out=tmp_path / "teacher", trainer=FAST)
    assert state_of(began)[1:] == before[1:]
    torch.testing.assert_close(state_of(began)[0], before[0], rtol=0, atol=0)
    assert not torch.allclose(next(teacher.parameters()), next(began.parameters()))

    teacher.train()
    before = state_of(teacher)
    guided = distill_guidance(teacher, data, w_range=(0.0, 3.0), out=tmp_path / "guided", trainer=FAST)
    student = distill_steps(guided, data, start_steps=8, last_steps=2, out=tmp_path / "steps", trainer=FAST)
    assert state_of(teacher)[1:] == before[1:]
    torch.testing.assert_close(state_of(teacher)[0], before[0], rtol=0, atol=0)
    assert student.distilled.num_steps == 2 and student.w_range == (0.0, 3.0)

    x = sample(student, 5, w=1.5, cond=[2, 0], seed=7)
    assert (
        x.shape == (5, *shape)
        and x.isfinite().all()
        and not torch.allclose(x, sample(student, 5, w=0.0, cond=[2, 0], seed=7))
    )
    loaded = wrap(network(shape), weights=tmp_path / "steps/stages/002/model.safetensors")
    torch.testing.assert_close(sample(loaded, 5, w=1.5, cond=[2, 0], seed=7), x, rtol=0, atol=0)
    for run in ("teacher", "guided", "steps/stages/004", "steps/stages/002"):
        with Image.open(tmp_path / run / "samples/0000002.png") as picture:
            assert min(picture.size) > 10
    again = distill_steps(guided, data, start_steps=8, last_steps=2, out=tmp_path / "steps", trainer=FAST)
    torch.testing.assert_close(again.state_dict(), student.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", SHAPES)
def test_an_interrupted_run_is_continued(kind, tmp_path, monkeypatch):
    shape = SHAPES[kind]
    data, teacher = data_of(shape), denoiser(shape)

    def stop(trainer, record):
        if trainer.update == 2:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        distill_steps(
            teacher,
            data,
            start_steps=4,
            last_steps=2,
            out=tmp_path,
            trainer={**FAST, "checkpoint_every": 1},
            callbacks=[stop],
        )
    student = distill_steps(
        teacher, data, start_steps=4, last_steps=2, out=tmp_path, trainer={**FAST, "checkpoint_every": 1}
    )
    whole = distill_steps(teacher, data, start_steps=4, last_steps=2, trainer={**FAST, "checkpoint_every": 1})
    torch.testing.assert_close(student.state_dict(), whole.state_dict(), rtol=0, atol=0)


METHODS = {
    "trajectory": {"num_steps": 2},
    "consistency": {"num_steps": 2},
    "flow_map": {},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["points", "video"])
def test_every_method_distils_them(kind, method, tmp_path):
    shape = SHAPES[kind]
    data, guided = data_of(shape), guidance_student(denoiser(shape), (0.0, 2.0))
    plain = {**FAST, "sample_every": None}
    student = distill_steps(guided, data, method=method, out=tmp_path, trainer=plain, **METHODS[method])
    steps = {"num_steps": 3} if method == "flow_map" else {}
    x = sample(student, 4, w=1.0, **steps)
    assert x.shape == (4, *shape) and x.isfinite().all()
    loaded = wrap(network(shape), weights=tmp_path)
    torch.testing.assert_close(sample(loaded, 4, w=1.0, **steps), x, rtol=0, atol=0)
    assert loaded.flow_map == (method == "flow_map")


@pytest.mark.parametrize("kind", SHAPES)
def test_every_solver_samples_them(kind):
    model = denoiser(SHAPES[kind])
    for name in SOLVERS:
        if name not in ("amed", "flow_map"):  # which need a predictor, and a flow map
            x = sample(model, 3, solver=name, num_steps=4, schedule={"name": "polynomial"})
            assert x.shape == (3, *SHAPES[kind]) and x.isfinite().all(), name


@pytest.mark.parametrize("form", ["amed", "plugin", "steps"])
@pytest.mark.parametrize("kind", SHAPES)
def test_learned_solvers_are_trained_for_them(kind, form, tmp_path):
    model = denoiser(SHAPES[kind])
    before = state_of(model)
    options = (
        {
            "objective": {
                "name": "endpoint",
                "teacher": {"name": "heun"},
                "teacher_schedule": {"name": "polynomial", "num_steps": 5},
                "trajectories": 8,
            }
        }
        if form == "steps"
        else {}
    )
    predictor = {"name": "table"} if form == "steps" else None
    learned = train_solver(
        model,
        num_steps=2,
        form=form,
        predictor=predictor,
        w=1.0,
        out=tmp_path,
        trainer={**FAST, "updates": 2},
        **options,
    )
    assert state_of(model)[1:] == before[1:]
    x = sample(model, 3, solver=learned, w=1.0)
    assert x.shape == (3, *SHAPES[kind]) and x.isfinite().all()
    torch.testing.assert_close(
        sample(model, 3, solver={"name": "learned", "predictor": str(tmp_path)}, w=1.0), x, rtol=0, atol=0
    )


def test_the_names_at_the_top_are_there():
    for name in diffdistill.__all__:
        assert callable(getattr(diffdistill, name))
    assert set(diffdistill.__all__) <= set(dir(diffdistill))
    assert load_denoiser is diffdistill.load_denoiser
