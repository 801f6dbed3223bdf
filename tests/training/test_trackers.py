"""Trackers are told what metrics.jsonl holds and shown the grids; the progress line says how long it will take."""

import logging
import sys

import pytest
import torch

from diffdistill.training import Run, Trainer
from diffdistill.training.progress import Pace, duration
from tests.training.problems import Fit, HeldRows, settings


def trained(path, **changes):
    run = Run(path, {"trainer": {"rate": 1.0}})
    options = {"updates": 6, "log_every": 2, "sample_every": 3, "checkpoint_every": 3, **changes}
    Trainer(Fit(), HeldRows(), settings(**options), run, on_samples=lambda model: torch.zeros(4, 3, 5, 6)).train()
    return run.metrics()


def test_tensorboard_holds_numbers_grids_and_the_config_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, updates=4, log_to=("tensorboard",))
    metrics = trained(tmp_path, log_to=("tensorboard",))  # goes on from update 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(r["update"], pytest.approx(r[name], rel=1e-6)) for r in metrics] and len(found) == 3
    assert [event.step for event in events.Images("samples")] == [3, 4, 6]
    (config,) = {event.tensor_proto.string_val[0] for event in events.Tensors("config/text_summary")}
    assert b'"rate": 1.0' in config


def test_weights_and_biases_holds_them_in_its_folder(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told = []
    monkeypatch.setattr(wandb.Run, "log", lambda run, values, step=None, **options: told.append((step, values)))
    metrics = trained(tmp_path, log_to=("wandb",))
    losses = [(step, values["loss"]) for step, values in told if "loss" in values]
    assert losses == [(record["update"], record["loss"]) for record in metrics]
    assert [step for step, values in told if "samples" in values] == [3, 6]
    assert list((tmp_path / "wandb").glob("offline-run-*")) and wandb.run is None


def test_a_tracker_that_is_unknown_or_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"log_to must be .*tensorboard"):
        settings(log_to=("mlflow",))
    for name, module in (("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"log_to=\[{name}\] needs an extra: pip install .diffdistill.trackers"):
            trained(tmp_path / name, log_to=(name,))


def test_a_log_without_a_terminal_says_loss_speed_and_time_left(tmp_path, caplog, monkeypatch):
    class NoBar:
        disable = True

        def __init__(self, *args, **options):
            pass

        def __getattr__(self, name):
            return lambda *args, **options: self

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    monkeypatch.setattr("diffdistill.training.trainer.tqdm", NoBar)
    with caplog.at_level(logging.INFO, "diffdistill"):
        trained(tmp_path)
    lines = [r.message for r in caplog.records if r.message.startswith("update")]
    assert len(lines) == 3 and lines[0].startswith("update 2 of 6, loss ")
    assert "images/s, " in lines[0] and lines[0].endswith(" left") and lines[2].endswith(", 0 s left")


def test_pace_and_durations_in_words():
    pace = Pace(seconds=0.5, images=512, left=7200)
    assert pace.images_per_second == "1024 images/s" and Pace(3.0, 8, 1).images_per_second == "2.7 images/s"
    assert pace.time_left == "60 min"
    assert [duration(s) for s in (0, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
