"""Training objectives of learned solvers: gradients against finite differences, the cheap ways against the plain."""

import pytest
import torch

from diffdistill.learned import (
    EndpointDistillation,
    Endpoints,
    FeatureDistance,
    LearnedSchedule,
    StepwiseDistillation,
)
from diffdistill.models import ClassifierFreeGuidance, GaussianMixture
from diffdistill.solvers import (
    AMEDPlugin,
    AMEDPredictor,
    Heun,
    LearnedTable,
    ProbabilityFlow,
    make_schedule,
    make_solver,
    sample,
)
from diffdistill.solvers.amed import LearnedSteps, LinearSteps, LinearTable
from tests.builders import tiny_denoiser

FORMS = ["amed", "dpm2", "euler", "ipndm", "dpmpp", "unipc"]
SINGLE_STEP = FORMS[:3]
SIGMAS = make_schedule("polynomial", num_steps=3, sigma_min=0.05, sigma_max=20.0)
FINE = make_schedule("polynomial", num_steps=6, sigma_min=0.05, sigma_max=20.0)


def denoiser():
    return tiny_denoiser().double()


def learned(form, predictor, afs=True):
    if form == "amed":
        return make_solver("amed", predictor=predictor, afs=afs)
    return AMEDPlugin(make_solver(form, afs=afs), predictor)


def stepwise(form, afs=True, **options):
    torch.manual_seed(1)
    solver = learned(form, AMEDPredictor(0.3, 0.2, scale_first=0.1, initial="published").double(), afs)
    return StepwiseDistillation(denoiser(), solver, sigmas=SIGMAS, teacher=Heun(), teacher_sigmas=FINE, **options)


def batch(size=3):
    torch.manual_seed(2)
    return {"noise": torch.randn(size, 2, 8, 8, dtype=torch.float64), "y": torch.arange(size) % 4}


def run(objective):
    """The losses and their summed gradient, without optimiser steps."""
    objective.trained.zero_grad()
    values = []
    for loss in objective.losses(batch(), torch.Generator()):
        loss.value.backward()
        values.append(loss.value.item())
    return values, torch.cat([p.grad.flatten() for p in objective.trained.parameters()])


@pytest.mark.parametrize("form", ["amed", "ipndm"])
def test_the_gradient_of_a_training_step_equals_finite_differences(form):
    objective = stepwise(form)
    _, gradient = run(objective)
    parameters = list(objective.trained.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    eps, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * eps)
            # the second step of a multistep solver starts where the first ended: only the first has this gradient
            values.append(next(iter(objective.losses(batch(), torch.Generator()))).value.item())
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=-sign * eps)
    objective.trained.zero_grad()
    next(iter(objective.losses(batch(), torch.Generator()))).value.backward()
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("afs", [True, False])
def test_forward_mode_and_reuse_change_nothing(form, afs):
    values, gradient = run(stepwise(form, afs, reuse=False))
    for options in ({"reuse": True}, {"reuse": True, "forward_mode": True}):
        same_values, same_gradient = run(stepwise(form, afs, **options))
        assert same_values == pytest.approx(values, rel=1e-9)
        torch.testing.assert_close(same_gradient, gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize("form", ["ipndm", "dpmpp", "unipc"])
def test_a_multistep_solver_is_trained_along_its_own_run(form):
    """The loss of its last step is the distance of the ends."""
    objective, data = stepwise(form), batch()
    values, _ = run(objective)
    model, noise, cond = objective.denoiser, data["noise"], data["y"]
    end = sample(model, noise, solver=objective.solver, sigmas=SIGMAS, cond=cond)
    target = sample(model, noise, solver=Heun(), sigmas=FINE, cond=cond)
    assert values[-1] == pytest.approx((end - target).square().sum().item() / 3, rel=1e-9)


@pytest.mark.parametrize("form", SINGLE_STEP)
def test_all_steps_in_one_batch_sum_to_the_steps_in_turn(form):
    values, gradient = run(stepwise(form))
    for forward_mode in (False, True):
        total, same = run(stepwise(form, together=True, forward_mode=forward_mode))
        assert total == [pytest.approx(sum(values), rel=1e-9)]
        torch.testing.assert_close(same, gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize("form", ["amed", "ipndm"])
def test_evaluations_that_are_spent(form):
    """Teacher 12; the student 3 mid points and, unless reused, 2 starts (the first is analytic)."""
    counted = []

    class Counting(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.bottleneck = inner, inner.bottleneck
            self.data_shape, self.num_classes = inner.data_shape, inner.num_classes

        def forward(self, x, sigma, cond=None):
            counted.append(len(x))
            return self.inner(x, sigma, cond)

    for reuse, expected in ((False, 17), (True, 15 if form == "amed" else 17)):
        objective = stepwise(form, reuse=reuse)
        objective.denoiser = Counting(objective.denoiser)
        counted.clear()
        run(objective)
        assert len(counted) == expected


def test_training_reduces_the_error_and_the_teacher_stays_as_it_is():
    objective = stepwise("amed")
    before = {k: v.clone() for k, v in objective.denoiser.state_dict().items()}
    optimizer = torch.optim.Adam(objective.trained.parameters(), lr=5e-3)
    totals = []
    for _ in range(8):
        total = 0.0
        for loss in objective.losses(batch(), torch.Generator()):
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
            total += loss.value.item()
        totals.append(total)
    assert totals[-1] < 0.9 * totals[0]
    assert all(torch.equal(v, before[k]) for k, v in objective.denoiser.state_dict().items())


def test_guided_teachers_train_too():
    objective = stepwise("dpmpp")
    objective.denoiser = ClassifierFreeGuidance(objective.denoiser, 1.5)
    values, gradient = run(objective)
    assert len(values) == 3 and gradient.isfinite().all() and gradient.any()


def mixture():
    torch.manual_seed(3)
    return GaussianMixture(weights=[0.7, 0.3], means=torch.randn(2, 2, 5, 7), variances=[0.3, 0.1])


def test_the_gradient_of_the_end_point_reaches_numbers_and_levels():
    model = mixture()
    data = Endpoints(
        model, make_solver("dpmpp"), make_schedule("logsnr", num_steps=30, sigma_min=0.05, sigma_max=20.0), range(4)
    )
    for solver in (
        LearnedSteps(make_solver("deis", order=3, afs=True), LearnedTable(3, scale_dir=0.9, scale_time=0.5).double()),
        AMEDPlugin(
            make_solver("dpmpp", afs=True), LearnedTable(3, scale_dir=0.5, scale_time=0.2, scale_first=0.3).double()
        ),
    ):
        objective = EndpointDistillation(model, solver, sigmas=SIGMAS)
        objective.double()
        columns = {name: column.double() for name, column in data.tensors().items()}
        objective.loss(columns, torch.Generator()).value.backward()
        for name, parameter in objective.trained.named_parameters():
            if name == "predictor.logit_r" and isinstance(solver, LearnedSteps):
                assert parameter.grad is None
                continue
            for i in range(len(parameter)):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter[i] += sign * 1e-5
                        values.append(objective.loss(columns, torch.Generator()).value.item())
                        parameter[i] -= sign * 1e-5
                assert parameter.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7), (
                    name
                )


def test_the_gradient_of_the_end_point_reaches_every_weight_of_past_answers():
    model = mixture()
    fine = make_schedule("logsnr", num_steps=30, sigma_min=0.05, sigma_max=20.0)
    columns = Endpoints(model, make_solver("dpmpp"), fine, range(4)).tensors()
    columns = {name: column.double() for name, column in columns.items()}
    for options in ({}, {"sum_to_zero": True, "lags": 2}):
        table = LinearTable(3, scale_dir=0.3, **options).double()
        objective = EndpointDistillation(model, LinearSteps(make_solver("ipndm", order=2), table), sigmas=SIGMAS)
        objective.double().loss(columns, torch.Generator()).value.backward()
        slopes = finite_differences(
            table.weight, lambda objective=objective: objective.loss(columns, torch.Generator()).value
        )
        torch.testing.assert_close(table.weight.grad, slopes, rtol=1e-4, atol=1e-7)
        used = torch.ones_like(slopes).tril(-bool(options)).bool()
        assert slopes[used].abs().min() > 1e-6 and not slopes[~used].any()


def finite_differences(parameter, value, eps=1e-5):
    slopes = torch.zeros_like(parameter)
    flat, out = parameter.data.view(-1), slopes.view(-1)
    for i in range(len(flat)):
        ends = []
        for sign in (1, -1):
            flat[i] += sign * eps
            ends.append(value().item())
            flat[i] -= sign * eps
        out[i] = (ends[0] - ends[1]) / (2 * eps)
    return slopes


WHOLE_RUNS = {
    "plugin on deis": lambda: AMEDPlugin(
        make_solver("deis", order=3, afs=True), AMEDPredictor(0.2, 0.2, initial="published").double()
    ),
    "plugin on unipc": lambda: AMEDPlugin(
        make_solver("unipc", prediction="eps"), AMEDPredictor(0.2, 0.2, scale_first=0.1, initial="published").double()
    ),
    "amed": lambda: make_solver("amed", predictor=AMEDPredictor(0.2, 0.2, initial="published").double()),
    "linear": lambda: LinearSteps(make_solver("unipc", order=3), filled(LinearTable(3, scale_dir=0.2)).double()),
}


def with_memory(run):
    """What `run` returns, and how many numbers it keeps for the backward pass."""
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return run(), sum(kept)


def filled(table):
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.normal_(std=0.3)
    return table


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_recomputed_steps_have_the_same_gradient_and_hold_one_step_in_memory(name):
    torch.manual_seed(5)
    model, data = denoiser(), batch()
    data["target"] = torch.randn_like(data["noise"])
    solver, found = WHOLE_RUNS[name](), []
    for recompute in (False, True):
        objective = EndpointDistillation(model, solver, sigmas=SIGMAS, recompute=recompute)
        value, stored = with_memory(lambda objective=objective: objective.loss(data, torch.Generator()).value)
        gradients = torch.autograd.grad(value, list(objective.trained.parameters()), allow_unused=True)
        found.append((value, [g for g in gradients if g is not None], stored))
    (plain, gradients, stored), (same, again, kept) = found
    assert torch.equal(plain, same) and kept < stored / 20
    for mine, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)
    assert any(g.any() for g in gradients)


def test_a_loss_beyond_the_limit_is_infinite_and_the_step_is_found():
    model, data = mixture(), {"noise": torch.randn(6, 2, 5, 7)}
    data["target"] = model.sample_data(6).float()
    table = LinearTable(3)
    objective = EndpointDistillation(model, LinearSteps(make_solver("euler"), table), sigmas=SIGMAS)
    first = objective.loss(data, torch.Generator()).value.item()
    with torch.no_grad():
        table.weight[1, 0] = 5e3
    assert objective.loss(data, torch.Generator()).value.item() == float("inf")
    assert objective.diverged_at() == 1
    again = EndpointDistillation(model, objective.solver, sigmas=SIGMAS)
    again.load_extra_state(objective.extra_state())
    assert again.first.item() == first and again.loss(data, torch.Generator()).value.item() == float("inf")


def test_distances_in_features_are_added_to_that_of_states():
    model, noise = mixture(), torch.randn(4, 2, 5, 7)
    data = {"noise": noise, "target": torch.randn(4, 2, 5, 7)}
    matrix = torch.randn(70, 3)
    values = {}
    for weight in (None, 0.25, 1.0):
        features = weight and FeatureDistance(lambda x: x.flatten(1) @ matrix, weight, decode=lambda x: 2 * x)
        solver = LearnedSteps(make_solver("euler"), LearnedTable(3, scale_dir=0.5))
        objective = EndpointDistillation(model, solver, sigmas=SIGMAS, features=features, learn_schedule=False)
        loss = objective.loss(data, torch.Generator())
        loss.value.backward()
        assert solver.predictor.logit_scale_dir.grad.all()
        values[weight] = loss.value.item()
    end = sample(model, noise, solver=solver, sigmas=SIGMAS)
    apart = (2 * (end - data["target"]).flatten(1) @ matrix).norm(dim=1).mean().item()
    assert values[1.0] == pytest.approx(apart, rel=1e-5)
    assert values[0.25] == pytest.approx(0.75 * values[None] + 0.25 * apart, rel=1e-5)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        FeatureDistance(lambda x: x, 0.0)


@pytest.mark.parametrize("form", ["amed", "dpmpp"])
def test_thresholding_is_of_teacher_and_solver(form):
    """Both meet at the ends of a run that is thresholded, and not otherwise."""
    plain, clipped = stepwise(form), stepwise(form, thresholding=lambda x: x.clamp(-0.1, 0.1))
    data = batch()
    values, _ = run(clipped)
    assert values != pytest.approx(run(plain)[0], rel=1e-3)
    if form == "dpmpp":  # a multistep solver is trained along its own run
        options = dict(cond=data["y"], thresholding=lambda x: x.clamp(-0.1, 0.1))
        end = sample(clipped.denoiser, data["noise"], solver=clipped.solver, sigmas=SIGMAS, **options)
        target = sample(clipped.denoiser, data["noise"], solver=Heun(), sigmas=FINE, **options)
        assert values[-1] == pytest.approx((end - target).square().sum().item() / 3, rel=1e-9)


def test_training_on_end_points_beats_the_fixed_solver_and_keeps_the_ends():
    model = mixture()
    fine = make_schedule("logsnr", num_steps=40, sigma_min=0.05, sigma_max=20.0)
    data = Endpoints(model, make_solver("dpmpp"), fine, range(64))
    solver = LearnedSteps(make_solver("dpmpp", order=2), LearnedTable(3, scale_dir=0.5, scale_time=0.2))
    objective = EndpointDistillation(model, solver, sigmas=SIGMAS)
    optimizer = torch.optim.Adam(objective.trained.parameters(), lr=0.03)
    first = objective.loss(data.tensors(), torch.Generator()).value.item()
    fixed = sample(model, data.tensors()["noise"], solver=make_solver("dpmpp", order=2), sigmas=SIGMAS)
    assert first == pytest.approx((fixed - data.tensors()["target"]).flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective.loss(data.tensors(), torch.Generator()).value
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
    levels = objective.schedule()
    assert levels[[0, -1]].tolist() == pytest.approx(SIGMAS[[0, -1]].tolist(), rel=1e-12)
    assert (levels.diff() < 0).all() and not torch.allclose(levels, SIGMAS, rtol=0.02)


def test_a_learned_schedule_starts_where_it_is_told_and_always_decreases():
    for sigmas in (SIGMAS, torch.cat([SIGMAS, torch.zeros(1)]), torch.tensor([3.0, 0.1]).double()):
        schedule = LearnedSchedule(sigmas)
        torch.testing.assert_close(schedule(), sigmas.double(), rtol=1e-6, atol=0)
        with torch.no_grad():
            schedule.logits.normal_(std=3.0)
        assert (schedule().diff() < 0).all()
        with torch.no_grad():
            schedule.logits[0] = 1e4
        assert (schedule().diff() < 0).all()
    with pytest.raises(ValueError, match="decrease"):
        LearnedSchedule(torch.tensor([1.0, 2.0]))


def test_bad_input():
    predictor = AMEDPredictor()
    options = dict(teacher=Heun(), teacher_sigmas=FINE)
    with pytest.raises(ValueError, match="M points more"):
        StepwiseDistillation(denoiser(), learned("amed", predictor), sigmas=make_schedule([20.0, 1.0, 0.05]), **options)
    with pytest.raises(ValueError, match="single-step"):
        StepwiseDistillation(denoiser(), learned("ipndm", predictor), sigmas=SIGMAS, together=True, **options)
    with pytest.raises(ValueError, match="norm, squared"):
        EndpointDistillation(denoiser(), learned("amed", predictor), sigmas=SIGMAS, distance="l1")
    with pytest.raises(ValueError, match="limit must be greater than 1"):
        EndpointDistillation(denoiser(), learned("amed", predictor), sigmas=SIGMAS, limit=0.5)
    objective = stepwise("amed")
    objective.denoiser = mixture()
    with pytest.raises(ValueError, match="no bottleneck"):
        run(objective)
    assert ProbabilityFlow(mixture()).features is None
