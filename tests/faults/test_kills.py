"""A run that is killed again and again ends in what the uninterrupted one ends in, bit for bit."""

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from diffdistill import load_denoiser
from diffdistill.models import save_denoiser
from diffdistill.training.run import read_metrics
from tests.builders import tiny_denoiser
from tests.faults.pipeline import STAGES, alone
from tests.training.several import CONTEXT


def attempt(folder, updates, *, stop_after=None, delay=0.0, signum=signal.SIGKILL, die_in_save=False):
    """Run both stages, or continue them, and send a signal after some updates; the exit code, 0 if they finished."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=alone, args=(theirs, folder, updates, die_in_save))
    child.start()
    theirs.close()
    seen = 0
    while True:
        try:
            said = ours.recv()
        except EOFError:
            break
        if said != 1:
            assert said == "done", said
            break
        seen += 1
        if seen == stop_after:
            time.sleep(delay)
            os.kill(child.pid, signum)
    child.join(60)
    return child.exitcode


def result(folder):
    weights = {stage: load_file(folder / stage / "model.safetensors") for stage in STAGES}
    metrics = [
        {name: value for name, value in record.items() if name != "seconds"}
        for stage in STAGES
        for record in read_metrics(folder / stage / "metrics.jsonl")
    ]
    return weights, metrics


def fresh(folder, teacher=None):
    """A folder with the teacher's file: by default a tiny one."""
    folder.mkdir()
    teacher = teacher or tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    save_denoiser(teacher, folder / "teacher.safetensors")
    return folder


def killed(folder, updates, kills, teacher):
    """Both stages with `kills` SIGKILLs at random moments, the second of them inside the writing of a checkpoint."""
    rng = random.Random(kills)
    fresh(folder, teacher)
    for i in range(kills):
        if i == 1:
            assert attempt(folder, updates, die_in_save=True) == -signal.SIGKILL
            continue
        # At most the updates that there are for each kill, so that no attempt runs to the end.
        after, delay = rng.randint(1, 3 * updates // kills), rng.random() * 0.02
        assert attempt(folder, updates, stop_after=after, delay=delay) == -signal.SIGKILL
    assert attempt(folder, updates) == 0
    return result(folder)


def check(folder, updates, kills, teacher=None):
    assert attempt(fresh(folder / "whole", teacher), updates) == 0
    weights, metrics = result(folder / "whole")
    again, again_metrics = killed(folder / "killed", updates, kills, teacher)
    assert len(metrics) == 3 * updates // 2
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    assert again_metrics == metrics


def test_three_kills_change_nothing(tmp_path):
    check(tmp_path, 6, 3)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    check(tmp_path, 30, 20, load_denoiser("digits-teacher"))  # the network of the quickstart


def test_signals_end_the_stages_cleanly_and_the_rest_is_the_same(tmp_path):
    assert attempt(fresh(tmp_path / "whole"), 12) == 0
    folder = fresh(tmp_path / "stopped")
    assert attempt(folder, 12, stop_after=1, signum=signal.SIGTERM) == 128 + signal.SIGTERM
    assert attempt(folder, 12, stop_after=5, signum=signal.SIGINT) == 128 + signal.SIGINT
    assert attempt(folder, 12) == 0
    torch.testing.assert_close(result(folder), result(tmp_path / "whole"), rtol=0, atol=0)
