"""A network in a file of the user's: taught, distilled in both stages and sampled by commands alone."""

import subprocess
import sys

import numpy as np
import pytest

from diffdistill.discrete_time import linear_table
from tests.scripts.calling import ROOT

NETWORK = """
import torch
from torch import nn

from diffdistill import register_network


@register_network("mine", null_label=10, w_into="time_mlp")
class Mine(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(11, width)
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t, y):
        term = self.time_mlp(t[:, None] / 1000) + self.labels(y)
        return self.last(torch.nn.functional.silu(self.first(x) + term[:, :, None, None]))
"""
PRESET = """
network: {{name: mine, width: 8}}
adapter: {{null_label: 10, w_into: time_mlp}}
preconditioning: {{name: eps, table: linear}}
sigma_min: {low}
sigma_max: {high}
"""
QUICK = ["trainer.updates=2", "trainer.batch_size=4", "trainer.device=cpu", "trainer.precision=fp32", "preview=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the file of a network and a preset for it."""
    path = tmp_path_factory.mktemp("own")
    table = linear_table()
    (path / "mine.py").write_text(NETWORK)
    (path / "presets/network").mkdir(parents=True)
    (path / "presets/network/mine.yaml").write_text(PRESET.format(low=float(table[0]), high=float(table[-1])))
    return path


def run(folder, *arguments):
    """Exit code and output of a command in a process of its own."""
    command = [sys.executable, "-m", "diffdistill", *arguments]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_from_the_network_to_samples_of_two_steps(folder):
    plugin = "plugins=[mine]"
    given = ["--config-dir", "presets", "network@model=mine", plugin, *QUICK, "out=teacher", "experiment=none"]
    commands = [
        ["train-teacher", *given],
        ["distill-guidance", plugin, "teacher=teacher", *QUICK, "out=guided", "experiment=none"],
        ["distill-steps", plugin, "teacher=guided", "start_steps=4", "last_steps=2", *QUICK, "out=steps"],
        ["sample", plugin, "model=steps/stages/002", "w=1", "num_samples=3", "save=npz", "device=cpu", "out=x"],
    ]
    for command in commands:
        code, said = run(folder, *command)
        assert code == 0, (command, said)
    with np.load(folder / "x/samples.npz") as file:
        assert file["x"].shape == (3, 1, 8, 8) and np.isfinite(file["x"]).all()
    code, said = run(folder, "sample", "model=steps/stages/002", "w=1", "out=y")
    assert code == 2 and "'mine'" in said and "plugins=" in said, said
