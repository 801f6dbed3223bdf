"""Training on: a run that is extended, begun with given weights, or sampled before it is finished."""

import shutil

import numpy as np
import pytest
import torch

from diffdistill import load_denoiser
from diffdistill.models import save_denoiser
from diffdistill.training.run import read_metrics
from tests.builders import tiny_denoiser
from tests.scripts.calling import call

QUICK = ["trainer.batch_size=8", "trainer.sample_every=null", "trainer.checkpoint_every=2", "trainer.log_every=1"]
QUICK += ["model.network.model_channels=16", "model.network.num_blocks=1", "trainer.warmup=3"]


def train(out, updates, *options):
    return call("train_teacher", f"trainer.updates={updates}", f"out={out}", *QUICK, *options)


def said(done, code=0):
    assert done.returncode == code, done.stderr
    return done.stderr


def weights(path):
    return load_denoiser(path).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    said(train(folder / "long", 6))
    said(train(folder / "short", 3))
    return folder


def test_a_finished_run_that_is_extended_is_the_longer_run_to_the_bit(runs, tmp_path):
    shutil.copytree(runs / "short", tmp_path / "run")
    assert not same(weights(tmp_path / "run"), weights(runs / "long"))
    said(train(tmp_path / "run", 6))
    assert same(weights(tmp_path / "run"), weights(runs / "long"))
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in (tmp_path / "run", runs / "long")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (tmp_path / "run/model.safetensors").stat().st_mtime_ns
    said(train(tmp_path / "run", 6))
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns == before
    assert "trainer.updates was 6 and is now 3" in said(train(tmp_path / "run", 3), 2)


def test_a_run_begins_with_given_weights(runs, tmp_path):
    path = runs / "long/model.safetensors"
    said(train(tmp_path / "on", 1, f"init={path}", "trainer.learning_rate=1e-30", "trainer.ema_half_life=null"))
    assert same(weights(tmp_path / "on"), weights(path))
    said(train(tmp_path / "on", 1, f"init={path}", "trainer.learning_rate=1e-30", "trainer.ema_half_life=null"))
    save_denoiser(tiny_denoiser(), tmp_path / "other.safetensors")
    assert "init=" in said(train(tmp_path / "x", 1, f"init={tmp_path / 'other.safetensors'}"), 2)
    assert "unknown model 'nope'" in said(train(tmp_path / "y", 1, "init=nope"), 2)


def test_an_unfinished_run_is_sampled_with_its_newest_average(runs, tmp_path):
    shutil.copytree(runs / "long", tmp_path / "run")
    (tmp_path / "run/finished.json").unlink()
    expected = weights(runs / "long")
    checkpoint = next((tmp_path / "run/checkpoints").glob("*.pt"))
    for model in (tmp_path / "run", checkpoint):
        assert same(weights(model), expected)
    options = ["num_steps=2", "num_samples=3", "save=npz"]
    done = call("sample", f"model={tmp_path / 'run'}", f"out={tmp_path / 'a'}", *options)
    assert "the average after 6 updates" in said(done)
    said(call("sample", f"model={runs / 'long'}", f"out={tmp_path / 'b'}", *options))
    assert np.array_equal(*(np.load(tmp_path / name / "samples.npz")["x"] for name in "ab"))
    shutil.copy(checkpoint, tmp_path / "alone.pt")
    message = "it is a checkpoint of a run of diffdistill: give the folder of that run"
    assert message in said(call("sample", f"model={tmp_path / 'alone.pt'}", f"out={tmp_path / 'c'}", *options), 2)
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/model.safetensors").unlink()
    done = call("sample", f"model={tmp_path / 'run'}", f"out={tmp_path / 'c'}", *options)
    assert "has neither a model nor a checkpoint yet" in said(done, 2)
    (tmp_path / "run/stages/004").mkdir(parents=True)
    assert "run/stages/004" in said(call("sample", f"model={tmp_path / 'run'}", f"out={tmp_path / 'c'}", *options), 2)
