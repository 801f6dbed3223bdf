"""Commands become jobs with hydra-submitit-launcher: the Slurm preset composes, and a job runs on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["sample", "distill_steps", "reproduce", "quickstart"])
def test_the_slurm_preset_composes(script):
    from hydra import compose, initialize_config_dir

    given = ["+cluster=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=4", "hydra.launcher.partition=p"]
    given += ["table=digits_students"] if script == "reproduce" else []
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        hydra = compose(script, given, return_hydra_config=True).hydra
    assert hydra.launcher._target_.endswith("SlurmLauncher") and hydra.mode.name == "MULTIRUN"
    assert (hydra.launcher.nodes, hydra.launcher.tasks_per_node, hydra.launcher.partition) == (2, 4, "p")


def test_a_job_runs_on_this_machine(tmp_path):
    options = ["model=digits-student-1", "w=1", "num_samples=2", "save=npz", "device=cpu", "seed=5"]
    command = [sys.executable, str(ROOT / "scripts/sample.py"), "+cluster=local", *options, "out=x${seed}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x5/samples.npz").exists()
