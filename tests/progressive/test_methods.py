"""Every method of few steps: exact students have zero loss, runs resume to the bit, and what cannot be is refused."""

import math

import pytest
import torch

from diffdistill import load_denoiser, sample
from diffdistill.denoiser import Distilled
from diffdistill.models import GuidanceConditioned, flow_map_student, guidance_student
from diffdistill.progressive.consistency import ConsistencyDistillation, ContinuousConsistency, fine_levels
from diffdistill.progressive.flow_map import FORMS, FlowMapDistillation
from diffdistill.progressive.methods import METHODS, distill
from diffdistill.progressive.objective import StepRegression
from diffdistill.progressive.trajectory import TrajectoryDistillation
from diffdistill.sampling.plans import plan
from diffdistill.solvers import Euler, make_schedule, make_solver
from diffdistill.training import Run, Trainer
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.randomness import BatchGenerator
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_batch, tiny_denoiser
from tests.progressive.gaussian import ExactHop, GaussianFlow

EDM, COSINE = make_weighting("edm"), make_noise_levels("cosine")
W = (0.0, 3.0)


def cosine(num_steps):
    return make_schedule("cosine", num_steps=num_steps, sigma_min=0.0, sigma_max=80.0)


def above_zero(num_steps):
    return make_schedule("polynomial", num_steps=num_steps, sigma_min=0.006, sigma_max=80.0)


def objectives(teacher, student, w_range, **changes):
    """One of each kind, by name."""
    shared = {"weighting": EDM, "w_range": w_range}
    levels, fine = [above_zero(4), above_zero(2)], [above_zero(8), above_zero(4)]
    solver = changes.get("solver", Euler())
    made = {
        f"flow map, {form}": FlowMapDistillation(teacher, student, noise_levels=COSINE, form=form, **shared)
        for form in FORMS
    }
    made["consistency"] = ConsistencyDistillation(
        teacher, student, sigmas=cosine(3), fine=(2, 8), solver=solver, **shared
    )
    made["continuous"] = ContinuousConsistency(teacher, student, sigmas=cosine(3), noise_levels=COSINE, **shared)
    made["trajectory"] = TrajectoryDistillation(
        teacher, student, grids=levels, fine=fine, solver=solver, w_range=w_range
    )
    for objective in made.values():
        objective.progress = 0.5
    return made


KINDS = list(objectives(GaussianFlow(), GaussianFlow(), None))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_flow_map_has_zero_loss_and_another_has_not(kind):
    exact = GaussianFlow(variance=0.5)
    batch = {"x": 0.3 + 0.7 * torch.randn(17, 2, 5, 7, dtype=torch.float64)}
    for variance, zero in ((0.5, True), (0.2, False)):
        made = objectives(exact, GaussianFlow(variance=variance), None, solver=ExactHop(exact))[kind]
        if hasattr(made, "normalise"):
            made.normalise = False
        losses = [loss.value.item() for loss in made.losses(batch, torch.Generator().manual_seed(0))]
        assert all(value < (1e-5 if kind == "trajectory" else 1e-18) for value in losses) == zero, losses
        assert max(losses) > 1e-3 or zero


@pytest.mark.parametrize("kind", ["flow map, eulerian", "flow map, lagrangian", "flow map, shortcut", "continuous"])
def test_w_reaches_teacher_and_student_alike(kind):
    exact = GaussianFlow(variance=0.5, w_range=W)
    batch = {"x": 0.3 + 0.7 * torch.randn(17, 2, 5, 7, dtype=torch.float64)}
    made = objectives(exact, GaussianFlow(variance=0.5, w_range=W), W)[kind]
    assert made.loss(batch, torch.Generator().manual_seed(0)).value.item() < 1e-18
    made.teacher.forward = lambda x, sigma, cond=None, w=None, s=None: GaussianFlow.forward(exact, x, sigma)
    assert made.loss(batch, torch.Generator().manual_seed(0)).value.item() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_has_the_losses_of_the_whole(kind):
    teacher = guidance_student(tiny_denoiser(), W)
    batch = tiny_batch(teacher, 6)
    made = objectives(teacher, flow_map_student(teacher), W)[kind]

    def losses(start, count):
        generator = BatchGenerator("cpu", start, count, 6).reseed(5)
        part = {name: value[start : start + count] for name, value in batch.items()}
        return torch.stack([loss.value.detach() for loss in made.losses(part, generator)])

    torch.testing.assert_close((losses(0, 3) + losses(3, 3)) / 2, losses(0, 6), rtol=1e-4, atol=1e-6)


def test_with_no_ramp_the_flow_map_regresses_the_teacher_as_stage_1_does():
    teacher = guidance_student(tiny_denoiser(), W)
    student = flow_map_student(teacher)
    made = FlowMapDistillation(
        teacher, student, noise_levels=COSINE, weighting=EDM, w_range=W, normalise=False, warmup=1.0
    )
    assert made.loss(tiny_batch(teacher), torch.Generator().manual_seed(0)).value.item() < 1e-10
    made.progress = 0.9
    assert made.loss(tiny_batch(teacher), torch.Generator().manual_seed(0)).value.item() > 1e-8


def test_shares_of_a_batch():
    made = FlowMapDistillation(
        GaussianFlow(), GaussianFlow(), noise_levels=COSINE, weighting=EDM, anchors=0.3, to_zero=0.2
    )
    hop = made.draw(20_000, torch.Generator().manual_seed(0))
    assert abs((hop.sigma_next == hop.sigma).double().mean() - 0.3) < 0.02
    assert abs((hop.sigma_next == 0).double().mean() - 0.2) < 0.02
    assert (hop.sigma_next <= hop.sigma).all() and (hop.sigma_mid <= hop.sigma * (1 + 1e-9)).all()
    assert (hop.sigma_mid >= hop.sigma_next * (1 - 1e-9)).all()


def test_fine_levels_keep_the_given_ones_and_are_the_schedule_where_that_is_cosine():
    sigmas = torch.tensor([80.0, 1.1, 0.0]).double()
    fine = fine_levels(sigmas, 4, scale=0.5)
    assert torch.equal(fine[::4], sigmas) and (fine[1:] < fine[:-1]).all() and len(fine) == 9
    torch.testing.assert_close(fine_levels(cosine(3), 5, scale=1.0), cosine(15), rtol=1e-9, atol=1e-12)


def test_levels_grow_from_few_to_many_and_end_where_their_segments_do():
    made = ConsistencyDistillation(GaussianFlow(), GaussianFlow(), sigmas=cosine(3), fine=(2, 8), weighting=EDM)
    found = []
    for progress in (0.0, 0.5, 1.0):
        made.progress = progress
        edges = made.edges(torch.device("cpu"))
        found.append(len(edges) // 3)
        assert torch.equal(edges[:, 2].unique().flip(0), cosine(3)[1:])
        assert (edges[:, 0] > edges[:, 1]).all() and (edges[:, 1] >= edges[:, 2]).all()
    assert found == [2, 4, 8]


def test_continuous_steps_end_at_the_next_level_below():
    made = ContinuousConsistency(
        GaussianFlow(), GaussianFlow(), sigmas=cosine(3), noise_levels=make_noise_levels("lognormal"), weighting=EDM
    )
    hop = made.draw(500, torch.Generator().manual_seed(0))
    for sigma, end in zip(hop.sigma, hop.sigma_next, strict=True):
        assert end == max(level for level in cosine(3).tolist() if level < sigma)


def trained(tmp_path, method, *, teacher=None, stop=None, schedule=cosine, **options):
    """A run of four updates; `stop` interrupts it after so many and goes on."""
    teacher = guidance_student(tiny_denoiser(), W) if teacher is None else teacher
    batch = tiny_batch(teacher, 8)
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    trainer = {"updates": 4, "batch_size": 4, "ema_half_life": 10.0, "device": "cpu", "precision": "fp32"}
    trainer |= {"checkpoint_every": 1, "log_every": 1}

    def go():
        return distill(
            teacher,
            rows,
            Run(tmp_path, {}),
            method=method,
            options=options,
            schedule=schedule,
            weighting=EDM,
            trainer=trainer,
        )

    if stop:
        counted = {"left": stop}

        def ended(self, batch, original=Trainer._step):
            if not counted["left"]:
                raise KeyboardInterrupt
            counted["left"] -= 1
            original(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", ended)
            with pytest.raises(KeyboardInterrupt):
                go()
    return go()


CASES = {
    "trajectory": ("trajectory", {"num_steps": 2, "points": 1}),
    "several": ("trajectory", {"variable_steps": [1, 2], "points": 1}),
    "analytic": ("trajectory", {"num_steps": 2, "points": 1, "afs": True}),
    "consistency": ("consistency", {"num_steps": 2, "fine": [1, 4], "error": "huber"}),
    "continuous": ("consistency", {"num_steps": 1, "levels": "continuous"}),
    "eulerian": ("flow_map", {}),
    "lagrangian": ("flow_map", {"form": "lagrangian"}),
    "shortcut": ("flow_map", {"form": "shortcut"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_in_the_same_bits_and_its_student_is_sampled(case, tmp_path):
    method, options = CASES[case]
    whole = trained(tmp_path / "whole", method, **options)
    again = trained(tmp_path / "again", method, stop=2, **options)
    ((num_steps, path),) = whole.items()
    student, other = load_denoiser(path), load_denoiser(again[num_steps])
    for name, value in student.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    planned = plan(student, w=1.0, num_steps=num_steps or 3)
    noise = torch.randn(3, 2, 8, 8)
    run = sample(
        planned.denoiser,
        noise,
        solver=planned.solver,
        sigmas=planned.sigmas,
        cond=torch.tensor([0, 1, 2]),
        return_trajectory=True,
    )
    assert run.nfe == planned.num_steps - ("afs" in options) and run.x[-1].isfinite().all()
    before = guidance_student(tiny_denoiser(), W).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items() if name in before)


def test_a_student_of_several_numbers_of_steps_has_the_levels_of_each(tmp_path):
    (path,) = trained(tmp_path, "trajectory", variable_steps=[1, 3], points=1, schedule=above_zero).values()
    student = load_denoiser(path)
    assert student.flow_map and student.distilled.counts == [3, 1]
    for n in (1, 3):
        torch.testing.assert_close(plan(student, w=1.0, num_steps=n).sigmas, above_zero(n))
    assert plan(student, w=1.0).num_steps == 3
    with pytest.raises(ValueError, match="num_steps=2: this student was distilled for 3 or 1 steps only"):
        plan(student, w=1.0, num_steps=2)


def test_a_flow_map_begins_as_its_teacher_for_every_end():
    teacher = guidance_student(tiny_denoiser(), W)
    student, batch = flow_map_student(teacher), tiny_batch(teacher)
    sigma, w = torch.tensor([0.1, 2.0, 70.0]).double(), torch.tensor([0.0, 1.0, 3.0])
    with torch.no_grad():
        expected = teacher(batch["x"], sigma, batch["y"], w=w)
        for share in (0.0, 0.4, 1.0):
            assert torch.equal(student(batch["x"], sigma, batch["y"], w=w, s=share * sigma), expected)
        student.model.map_s.weight.normal_()
        ignored = student(batch["x"], sigma, batch["y"], w=w)
        assert torch.equal(student(batch["x"], sigma, batch["y"], w=w, s=sigma), ignored)
        assert not torch.equal(student(batch["x"], sigma, batch["y"], w=w, s=0.4 * sigma), ignored)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_the_sampler_of_an_exact_flow_map_keeps_the_marginals_in_one_step_as_in_five(gamma):
    exact, batch = GaussianFlow(), 20_000
    for num_steps in (1, 5):
        run = sample(
            exact,
            torch.randn(batch, 2, 3, dtype=torch.float64),
            solver=make_solver("flow_map", gamma=gamma),
            sigmas=cosine(num_steps),
            seeds=range(batch),
            return_trajectory=True,
        )
        assert run.nfe == num_steps
        for x, sigma in list(zip(run.x, run.sigmas, strict=True))[1:]:
            variance, expected = (x - 0.3).var().item(), 0.5 + sigma.item() ** 2
            assert math.isclose(variance, expected, rel_tol=5 * math.sqrt(2 / x.numel()))


def test_one_step_of_an_exact_flow_map_arrives_where_many_do():
    exact, noise = GaussianFlow(), torch.randn(3, 2, 5, 7, dtype=torch.float64)
    ends = [sample(exact, noise, solver=make_solver("flow_map"), sigmas=cosine(n)).detach() for n in (1, 4)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("halvings", {}, "choose one of consistency, flow_map, halving, trajectory"),
        ("trajectory", {"num_steps": 0}, "at least 1"),
        ("trajectory", {"variable_steps": []}, "at least 1"),
        ("consistency", {"fine": [8, 8]}, "must grow"),
        ("consistency", {"fine": [0, 8]}, "must grow"),
        ("consistency", {"levels": "smooth"}, "discrete, continuous"),
        ("flow_map", {"form": "euler"}, "eulerian, lagrangian, shortcut"),
        ("flow_map", {"anchors": 0.9, "to_zero": 0.2}, "at most 1"),
        ("flow_map", {"warmup": -0.1}, "from 0 to 1"),
    ],
)
def test_bad_options(method, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, method, **options)


def test_what_a_method_cannot_work_with_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="must end at 0, but ends at 0.006"):
        trained(tmp_path / "a", "consistency", schedule=above_zero)
    student = guidance_student(tiny_denoiser(), W)
    student.distilled = Distilled((80.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="student of 2 steps already"):
        trained(tmp_path / "b", "trajectory", teacher=student)
    teacher = tiny_denoiser()
    with pytest.raises(ValueError, match="takes no guidance weight"):
        StepRegression(teacher, teacher, weighting=EDM, w_range=W)
    with pytest.raises(ValueError, match="models.flow_map_student"):
        FlowMapDistillation(teacher, teacher, noise_levels=COSINE, weighting=EDM)
    with pytest.raises(ValueError, match="solver=flow_map is for flow maps"):
        plan(teacher, num_steps=3, solver={"name": "flow_map"})
    with pytest.raises(ValueError, match="takes no end of a step"):
        teacher(torch.randn(3, 2, 8, 8), torch.ones(3).double(), s=torch.zeros(3).double())
    made = FlowMapDistillation(teacher, flow_map_student(teacher), noise_levels=COSINE, weighting=EDM)
    with pytest.raises(ValueError, match="torch.compile has no derivatives in forward mode"):
        made.compile_networks()


def test_the_flow_map_can_still_be_asked_for_the_denoised_image():
    """Other solvers take steps of the ODE with it, as with the teacher."""
    teacher = guidance_student(tiny_denoiser(), W)
    student, noise = flow_map_student(teacher), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        student.model.map_s.weight.normal_()
    planned = plan(student, w=1.0, num_steps=4, solver={"name": "heun"})
    assert isinstance(planned.denoiser, GuidanceConditioned)
    run = sample(planned.denoiser, noise, solver=planned.solver, sigmas=planned.sigmas, cond=None)
    assert run.isfinite().all()


def test_every_method_has_a_config():
    from pathlib import Path

    configs = Path(__file__).resolve().parents[2] / "configs/method"
    assert sorted(path.stem for path in configs.glob("*.yaml")) == sorted(METHODS)
