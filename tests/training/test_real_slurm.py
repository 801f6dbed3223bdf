"""Jobs on a real Slurm, where `sinfo` finds one: `pytest -m slow tests/training/test_real_slurm.py`, a few minutes.

The tests run on the CPU, in a folder beside this checkout, which the nodes must see. What a cluster asks for, sbatch
takes from its variables, such as SBATCH_PARTITION and SBATCH_ACCOUNT.
"""

import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffdistill.training.run import read_metrics
from tests.scripts.calling import ROOT, command

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
    pytest.skip("no Slurm answers", allow_module_level=True)

pytestmark = pytest.mark.slow
TRAINER = {"updates": 100, "batch_size": 8, "log_every": 5, "sample_every": "null", "checkpoint_every": 1000}
CPU = {"device": "cpu", "precision": "fp32", "channels_last": "false"}
RUN = ["experiment=digits/stage1", *(f"trainer.{name}={value}" for name, value in {**TRAINER, **CPU}.items())]
JOB = {"gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 1, "timeout_min": 30}
SUBMITTED = ["+cluster=slurm", *(f"hydra.launcher.{name}={value}" for name, value in JOB.items())]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(dir=ROOT.parent, prefix="slurm-") as path:
        yield Path(path)


def start(folder, *options):
    return subprocess.Popen(
        command("distill_guidance", *RUN, *options),
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, out + err


def test_a_job_that_is_put_back_computes_the_same_and_so_does_one_process(folder):
    name = f"test-{uuid.uuid4().hex[:8]}"
    job = start(folder, "out=job", *SUBMITTED, f"hydra.launcher.name={name}")
    while len(read_metrics(folder / "job/metrics.jsonl")) < 2 and job.poll() is None:
        time.sleep(0.5)
    subprocess.run(["scancel", "--signal=USR2", f"--name={name}"], check=True)  # what Slurm sends before a limit
    finished(job)
    log = next((folder / "runs/jobs/.submitit").glob("*/*_0_log.out")).read_text()
    assert "stopped at update" in log and "update 100 of 100" in log
    finished(start(folder, "out=whole", *SUBMITTED))
    assert losses(folder / "job") == losses(folder / "whole")
    assert weights(folder / "job") == weights(folder / "whole")
    finished(start(folder, "out=alone"))
    assert losses(folder / "job") == pytest.approx(losses(folder / "alone"), abs=1e-5)


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return {name: value.tolist() for name, value in load_file(run / "model.safetensors").items()}


def test_an_error_of_a_job_fails_it_and_reaches_the_command(folder):
    job = start(folder, "out=job", *SUBMITTED, "teacher=nothing")
    _, err = job.communicate(timeout=1800)
    assert job.returncode == 2 and err.splitlines()[-1].startswith("error: unknown model 'nothing'")
    log = next((folder / "runs/jobs/.submitit").glob("*/*_0_log.out"))
    assert "\nerror: unknown model 'nothing'" in log.read_text()
