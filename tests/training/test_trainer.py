import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdistill.training import (
    CheckpointError,
    Interrupted,
    Loss,
    NonFiniteLossError,
    Objective,
    Run,
    Trainer,
)
from diffdistill.training.average import WeightAverage
from diffdistill.training.randomness import rand
from tests.training.problems import Fit, HeldRows, Rows, settings


def state_of(trainer):
    return {
        "trained": trainer.objective.trained.state_dict(),
        "average": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
    }


def metrics_of(run):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.metrics()]


def test_every_update_and_every_seed_has_noise_of_its_own(tmp_path):
    def first_draws(seed):
        draws = []

        class Watched(Fit):
            def loss(self, batch, generator):
                draws.append(rand((12,), generator).tolist())
                return super().loss(batch, generator)

        train(tmp_path / str(seed), objective=Watched(), updates=4, seed=seed)
        return draws

    draws = [tuple(draw) for seed in (0, 1) for draw in first_draws(seed)]
    assert len(set(draws)) == len(draws) == 8


class Killed(BaseException):
    pass


def train(path, *, kill_after=None, objective=None, data=None, **changes):
    """Train, or die without warning after some updates; the trainer and the run."""
    run = Run(path, {})
    trainer = Trainer(objective or Fit(), data or HeldRows(), settings(**changes), run)
    if kill_after is not None:
        step = trainer._step

        def dying_step(batch):
            if trainer.update == kill_after:
                raise Killed
            step(batch)

        trainer._step = dying_step
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train()
    return trainer, run


@pytest.mark.parametrize("kills", [[13], [3, 6, 22]])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_run_that_continues_equals_an_uninterrupted_one_bit_for_bit(tmp_path, kills, optimizer):
    whole, whole_run = train(tmp_path / "whole", accumulation=2, optimizer=optimizer)
    for kill in kills:
        train(tmp_path / "killed", kill_after=kill, accumulation=2, optimizer=optimizer)
    resumed, resumed_run = train(tmp_path / "killed", accumulation=2, optimizer=optimizer)
    torch.testing.assert_close(state_of(resumed), state_of(whole), rtol=0, atol=0)
    assert metrics_of(resumed_run) == metrics_of(whole_run)
    assert [r["update"] for r in resumed_run.metrics()] == [5, 10, 15, 20, 23]


def test_a_finished_run_trains_no_further(tmp_path):
    first, _ = train(tmp_path)
    again, run = train(tmp_path, kill_after=None)
    torch.testing.assert_close(state_of(again), state_of(first), rtol=0, atol=0)
    assert len(run.metrics()) == 5


@pytest.mark.parametrize("accumulation", [2, 3, 12])
def test_accumulated_parts_equal_the_whole_batch(tmp_path, accumulation):
    def run(parts):
        # without dropout, whose masks belong to a part
        return train(tmp_path / str(parts), objective=Fit(dropout=0.0), accumulation=parts)

    whole, whole_run = run(1)
    parts, parts_run = run(accumulation)
    torch.testing.assert_close(
        parts.objective.trained.state_dict(), whole.objective.trained.state_dict(), rtol=1e-6, atol=1e-6
    )
    losses = [[r["loss"] for r in r_.metrics()] for r_ in (whole_run, parts_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_items_loaded_by_workers_give_the_same_run_as_items_in_memory(tmp_path):
    held, _ = train(tmp_path / "held", data=HeldRows())
    train(tmp_path / "loaded", data=Rows(), workers=2, kill_after=8)
    loaded, _ = train(tmp_path / "loaded", data=Rows(), workers=2)
    torch.testing.assert_close(state_of(loaded), state_of(held), rtol=0, atol=0)


def test_the_average_has_its_closed_form():
    module = nn.Linear(3, 2)
    average = WeightAverage(module)
    weights = [module.weight.detach().clone()]
    for decay in (0.9, 0.5):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        weights.append(module.weight.detach().clone())
        average.update(decay)
    expected = 0.5 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.5 * weights[2]
    torch.testing.assert_close(average.module.weight, nn.Parameter(expected, requires_grad=False))


def test_the_trainer_averages_over_the_updates(tmp_path):
    seen = []
    trainer = Trainer(Fit(), HeldRows(), settings(ema_rampup=None), Run(tmp_path, {}))
    expected = trainer.objective.trained[0].weight.detach().clone()
    step = trainer._step

    def watched(batch):
        step(batch)
        seen.append(trainer.objective.trained[0].weight.detach().clone())

    trainer._step = watched
    trainer.train()
    for weight in seen:
        expected = expected.lerp(weight, 1 - 0.5 ** (12 / 40))
    torch.testing.assert_close(trainer.model[0].weight.data, expected)
    assert not trainer.model.training


class Breaks(Fit):
    """Its loss is `bad` in one update."""

    def __init__(self, at, bad=float("nan")):
        super().__init__()
        self.at, self.bad, self.calls = at, bad, 0

    def loss(self, batch, generator):
        self.calls += 1
        loss = super().loss(batch, generator)
        return Loss(loss.value * (self.bad if self.calls == self.at else 1.0), loss.logs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("at", "kept"), [(14, 12), (12, 6), (23, 18)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, at, kept, bad):
    run = Run(tmp_path, {})
    trainer = Trainer(Breaks(at, bad), HeldRows(), settings(), run)
    with pytest.raises(
        NonFiniteLossError, match=f"at update {at}: the last good checkpoint is .*{kept:07d}.pt"
    ) as caught:
        trainer.train()
    assert caught.value.update == at
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None and checkpoint.update == kept
    assert all(t.isfinite().all() for t in checkpoint.state["trained"].values())
    assert all(r["update"] < at for r in run.metrics())


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path):
    class Poisons(Fit):
        def loss(self, batch, generator):
            loss = super().loss(batch, generator)
            loss.value.register_hook(lambda gradient: gradient * float("nan"))
            return loss

    run = Run(tmp_path, {})
    trainer = Trainer(Poisons(), HeldRows(), settings(clip=None, updates=1), run)
    with pytest.raises(NonFiniteLossError, match="weight is not finite after update 1"):
        trainer.train()
    assert run.load_checkpoint() is None


class TwoSteps(Objective):
    """Minimises (w - 1)^2 and then, from where the first step led, (w - 3)^2; counts its batches."""

    def __init__(self):
        super().__init__()
        self.trained = nn.ParameterDict({"w": nn.Parameter(torch.zeros(()))})
        self.batches = 0

    def losses(self, batch, generator):
        self.batches += 1
        assert batch["index"].shape == (4,)
        for target in (1.0, 3.0):
            yield Loss((self.trained["w"] - target).square())

    def extra_state(self):
        return {"batches": self.batches}

    def load_extra_state(self, state):
        self.batches = state["batches"]


def test_an_objective_may_make_several_steps_of_a_batch_without_data_and_keep_a_state(tmp_path):
    def run(updates):
        config = settings(
            updates=updates,
            batch_size=4,
            optimizer="sgd",
            betas=(0.0, 0.0),
            learning_rate=0.25,
            clip=None,
            warmup=0,
            decay="constant",
            ema_half_life=None,
        )
        objective = TwoSteps()
        Trainer(objective, None, config, Run(tmp_path, {})).train()
        return objective

    assert run(1).trained["w"].item() == 0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 3
    assert run(2).batches == 2


def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(tmp_path):
    train(tmp_path)

    class Wider(Fit):
        def __init__(self):
            super().__init__()
            self.trained = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 5))

    with pytest.raises(CheckpointError, match="0000023.pt is not one of this model: .*") as caught:
        train(tmp_path, objective=Wider())
    assert "\n" not in str(caught.value)


def test_pictures_are_drawn_while_training(tmp_path):
    config = settings(updates=6, sample_every=3)
    run = Run(tmp_path, {})
    Trainer(Fit(), HeldRows(), config, run, on_samples=lambda model: torch.zeros(5, 1, 8, 8)).train()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000003.png", "0000006.png"]
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"channels_last": True}])
def test_the_switches_train(tmp_path, changes):
    _, run = train(tmp_path, **changes, updates=40, learning_rate=1e-2)
    losses = [r["loss"] for r in run.metrics()]
    assert losses[-1] < 0.8 * losses[0]


class EagerFit(Fit):
    """Compiled without a code generator, which would take half a minute."""

    def compile_networks(self, backend="inductor"):
        super().compile_networks("eager")


def test_compiled_modules_train_the_same(tmp_path):
    plain, _ = train(tmp_path / "plain", updates=6)
    compiled, _ = train(tmp_path / "compiled", updates=6, objective=EagerFit(), compile=True)
    assert compiled.objective.teacher._compiled_call_impl is not None
    torch.testing.assert_close(state_of(compiled), state_of(plain))


def test_errors_name_what_is_wrong(tmp_path):
    class Nothing(Objective):
        def __init__(self):
            super().__init__()
            self.trained = nn.Linear(2, 2).requires_grad_(False)

    with pytest.raises(ValueError, match="trains no parameter"):
        Trainer(Nothing(), None, settings(), Run(tmp_path, {}))
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        Trainer(Fit(), None, settings(device="abacus"), Run(tmp_path, {}))
    with pytest.raises(ValueError, match="data set is empty"):
        Trainer(Fit(), Rows(0), settings(), Run(tmp_path, {}))


class Signalled(Fit):
    """A signal comes in its last update, or while its last checkpoint is written."""

    def __init__(self, late):
        super().__init__()
        self.late, self.calls = late, 0

    def loss(self, batch, generator):
        self.calls += 1
        if self.calls == 6 and not self.late:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch, generator)

    def extra_state(self):
        if self.late:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_in_the_last_update_is_not_lost(tmp_path, late):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        if late:
            train(tmp_path, objective=Signalled(late), updates=6, checkpoint_every=None)
            assert heard == [signal.SIGTERM]
        else:
            with pytest.raises(Interrupted):
                train(tmp_path, objective=Signalled(late), updates=6, checkpoint_every=None)
            assert not heard
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Run(tmp_path, {}).load_checkpoint().update == 6


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_by_another_program_is_refused(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="is in use by another program"):
        train(tmp_path)
    assert not Run(tmp_path, {}).metrics()
    other.kill()
    other.wait()
    train(tmp_path, updates=1)


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.training.problems import Fit, Rows, settings
from diffdistill.training import Run, Trainer

class Slow(Fit):
    def loss(self, batch, generator):
        print("update", flush=True)
        time.sleep(0.02)
        return super().loss(batch, generator)

Trainer(Slow(), Rows(), settings(updates=10_000, checkpoint_every=None, workers=1), Run({out!r}, {{}})).train()
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_writes_a_checkpoint_and_ends_the_run(tmp_path, signum, code):
    script = SCRIPT.format(root=str(Path(__file__).parents[2]), out=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "run it again to continue" in errors
    checkpoint = Run(tmp_path, {}).load_checkpoint()
    assert checkpoint is not None and checkpoint.update >= 2
    assert json.loads(checkpoint.path.with_suffix(".json").read_text())["update"] == checkpoint.update
