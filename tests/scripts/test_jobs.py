"""Commands become jobs with hydra-submitit-launcher: the Slurm preset composes, and a job runs on this machine."""

import subprocess
from importlib.util import find_spec

import pytest
from hydra.errors import MissingConfigException

from tests.scripts.calling import ROOT, command

from common.errors import about_a_job, one_line  # isort: skip

INSTALLED = find_spec("hydra_plugins") is not None and find_spec("hydra_plugins.hydra_submitit_launcher") is not None
needs_the_extra = pytest.mark.skipif(not INSTALLED, reason="needs hydra-submitit-launcher")


@needs_the_extra
@pytest.mark.parametrize("script", ["sample", "distill_steps", "reproduce", "quickstart"])
def test_the_slurm_preset_composes(script):
    from hydra import compose, initialize_config_dir

    given = ["+cluster=slurm", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=4", "hydra.launcher.partition=p"]
    given += ["table=digits_students"] if script == "reproduce" else []
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        hydra = compose(script, given, return_hydra_config=True).hydra
    assert hydra.launcher._target_.endswith("SlurmLauncher") and hydra.mode.name == "MULTIRUN"
    assert (hydra.launcher.nodes, hydra.launcher.tasks_per_node, hydra.launcher.partition) == (2, 4, "p")


SAMPLE = ["+cluster=local", "w=1", "num_samples=2", "save=npz", "device=cpu", "seed=5", "out=x${seed}"]


def job(folder, *options):
    """A command that becomes a job, and the log of the job."""
    done = subprocess.run(command("sample", *SAMPLE, *options), cwd=folder, capture_output=True, text=True)
    assert str(folder / "runs/jobs/.submitit") in done.stdout
    return done, next((folder / "runs/jobs/.submitit").glob("*/*_0_log.out")).read_text()


@needs_the_extra
def test_a_job_runs_on_this_machine(tmp_path):
    done, _ = job(tmp_path, "model=digits-student-1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x5/samples.npz").exists()


@needs_the_extra
def test_an_error_of_a_job_is_in_its_log_and_reaches_the_command(tmp_path):
    done, log = job(tmp_path, "model=nothing")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: unknown model 'nothing'")
    assert "\nerror: unknown model 'nothing'" in log and "Traceback" not in log + done.stderr


def test_without_the_launcher_the_extra_is_named():
    error = MissingConfigException("", missing_cfg_file="hydra/launcher/submitit_slurm")
    assert 'pip install -e ".[slurm]"' in one_line(error)


def test_the_end_of_a_job_is_one_line():
    error = RuntimeError(
        f"Job 10 with path x\nhas no output. Look at: y\n{'-' * 40}\nupdate 1\nslurmstepd: CANCELLED\n"
    )
    assert about_a_job(error) == "Job 10 with path x has no output. Look at: y slurmstepd: CANCELLED"


def test_a_refused_job_was_not_submitted():
    error = RuntimeError("sbatch: error: invalid partition specified: nope")
    error.__cause__ = subprocess.CalledProcessError(1, ["sbatch"])
    assert about_a_job(error) == "the job was not submitted, for the reason above"
