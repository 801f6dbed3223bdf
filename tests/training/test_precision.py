"""`precision=auto` takes bf16 where it pays, says so, keeps to it, and its timing changes nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdistill.devices import channels_last
from diffdistill.training import Interrupted, Run, Trainer, precision, signals
from tests.training.problems import Fit, HeldRows, settings


class Stateful(Fit):
    """With statistics of batches in its network, and a state of its own that every loss changes."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Sequential(nn.BatchNorm1d(5), self.trained)
        self.calls = 0

    def loss(self, batch, generator):
        self.calls += 1
        return super().loss(batch, generator)

    def extra_state(self):
        return {"calls": self.calls}

    def load_extra_state(self, state):
        self.calls = state["calls"]


def train(path, objective=None, config=None, **changes):
    objective = objective or Stateful()
    trainer = Trainer(objective, HeldRows(), settings(**changes), Run(path, config or {}))
    return trainer, trainer.train().state_dict()


@pytest.fixture
def timed(monkeypatch):
    """A CPU with instructions for bf16, on which a timing takes what the dict says for each precision."""
    seconds = {"fp32": 1.0, "bf16": 0.5}

    def fake(update, kinds):
        for kind in kinds:
            update(kind)
        return {kind: seconds[kind] for kind in kinds}

    monkeypatch.setattr(precision, "native_bf16", lambda device: True)
    monkeypatch.setattr(precision, "_seconds", fake)
    return seconds


@pytest.mark.parametrize(("share", "chosen"), [(0.5, "bf16"), (0.9, "fp32"), (3.0, "fp32")])
def test_the_faster_one_is_taken_and_its_timing_changes_nothing(tmp_path, timed, share, chosen, capsys):
    timed["bf16"] = share
    trainer, state = train(tmp_path / "auto", precision="auto", accumulation=2)
    assert f"precision={chosen}: bf16 takes {share:.2f} of the time" in capsys.readouterr().err
    other, expected = train(tmp_path / "said", precision=chosen, accumulation=2)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    assert trainer.objective.calls == other.objective.calls == 46
    assert trainer.run.metrics()[-1]["loss"] == other.run.metrics()[-1]["loss"]


def test_a_run_and_its_stages_keep_what_they_began_with(tmp_path, timed, capsys):
    whole, _ = train(tmp_path / "whole", precision="auto")
    first, _ = train(tmp_path / "parts", precision="auto", updates=9, decay="constant", warmup=0)
    assert first.precision == "bf16" and capsys.readouterr().err.count("precision=bf16") == 2
    timed["bf16"] = 2.0
    again, _ = train(tmp_path / "parts", precision="auto", updates=11, decay="constant", warmup=0)
    assert again.precision == "bf16" and "precision=" not in capsys.readouterr().err
    stage = Trainer(
        Stateful(), HeldRows(), settings(precision="auto", updates=1), Run(tmp_path / "parts", {}).stage("2")
    )
    stage.train()
    assert stage.precision == "bf16"
    other, _ = train(tmp_path / "parts_of_others", precision="auto", updates=1)
    assert other.precision == "fp32"


def test_what_has_no_form_in_bf16_computes_in_float32(tmp_path, timed, capsys):
    class Picky(Fit):
        def loss(self, batch, generator):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no kernel for BFloat16\nin detail")
            return super().loss(batch, generator)

    trainer, _ = train(tmp_path, Picky(), precision="auto", updates=2)
    assert trainer.precision == "fp32"
    assert "does not compute in bf16 here (no kernel for BFloat16)" in capsys.readouterr().err


def test_a_failed_run_leaves_nothing_that_the_corrected_one_trips_over(tmp_path, timed):
    class Broken(Fit):
        def loss(self, batch, generator):
            raise ValueError("a bad setting")

    with pytest.raises(ValueError, match="a bad setting"):
        train(tmp_path, Broken(), {"bad": 1}, precision="auto")
    trainer, _ = train(tmp_path, None, {"bad": 2}, precision="auto", updates=2)
    assert trainer.precision == "bf16"


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.training.test_precision import train
from pathlib import Path
trainer, _ = train(Path({out!r}), precision="auto", updates=2)
print(trainer.precision)
"""


def test_a_cpu_without_instructions_for_bf16_computes_in_float32(tmp_path):
    script = SCRIPT.format(root=str(Path(__file__).parents[2]), out=str(tmp_path))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "fp32"
    assert "precision=fp32: this CPU has no instructions for bf16" in done.stderr


class Signalled(Fit):
    """A signal comes in the second part of update 4, of three."""

    calls = 0

    def loss(self, batch, generator):
        self.calls += 1
        if self.calls == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch, generator)


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_slow_update_is_given_up_between_its_parts_and_made_again(tmp_path, monkeypatch, capfd, patience):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", patience)
    _, whole = train(tmp_path / "whole", Fit(), accumulation=3, updates=7)
    objective = Signalled()
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", objective, accumulation=3, updates=7)
    assert objective.calls == (11 if patience == 0 else 12)
    assert Run(tmp_path / "parts", {}).load_checkpoint().update == (3 if patience == 0 else 4)
    shown = capfd.readouterr().err
    assert "SIGTERM: waiting for update 4 to end" in shown and "run it again to continue" in shown
    _, resumed = train(tmp_path / "parts", Fit(), accumulation=3, updates=7)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_signal_during_the_timing_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(precision, "native_bf16", lambda device: True)

    class Asked(Fit):
        calls = 0

        def loss(self, batch, generator):
            self.calls += 1
            os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch, generator)

    objective = Asked()
    with pytest.raises(Interrupted):
        train(tmp_path, objective, updates=7, precision="auto")
    assert objective.calls == 1 and Run(tmp_path, {}).load_checkpoint().update == 0
    assert "waiting for update 1 to end" in capfd.readouterr().err
    trainer, _ = train(tmp_path, Fit(), updates=7, precision="auto")
    assert trainer.update == 7


def test_an_update_that_has_changed_something_is_not_given_up(tmp_path, monkeypatch):
    class Asked(Stateful):
        def loss(self, batch, generator):
            if self.calls == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch, generator)

    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        train(tmp_path, Asked(), updates=7)
    assert Run(tmp_path, {}).load_checkpoint().update == 5


def test_only_weights_of_four_dimensions_change_their_layout():
    class Kept(nn.Conv2d):
        keeps_layout = True

    network = nn.Sequential(nn.Conv2d(2, 3, 5), nn.Conv3d(2, 3, 5), nn.Conv1d(2, 3, 5), Kept(2, 3, 5))
    before = [p.clone() for p in network.parameters()]
    assert channels_last(network) is network
    layouts = [m.weight.is_contiguous(memory_format=torch.channels_last) for m in (network[0], network[3])]
    assert layouts == [True, False] and network[1].weight.is_contiguous()
    torch.testing.assert_close([*network.parameters()], before, rtol=0, atol=0)
