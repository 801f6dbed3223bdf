"""The wheel, installed into a fresh environment and run outside of any checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.scripts.calling import ROOT

pytest.importorskip("hatchling", reason="builds the wheel")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and of all else what this one has."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env")
    (wheel,) = folder.glob("*.whl")
    python = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    # A line of a .pth names a folder; those that lie in it are not read, such as that of an editable install.
    (packages / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin"


def run(program, *arguments, cwd):
    """What `PROGRAM ARGUMENTS` prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([program, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_brings_its_commands_and_samples_a_shipped_model(installed, tmp_path):
    where = "import diffdistill; print(diffdistill.__file__)"
    assert Path(run(installed / "python", "-c", where, cwd=tmp_path)).is_relative_to(installed.parent)
    names = [path.stem.replace("_", "-") for path in (ROOT / "scripts").glob("*.py")]
    listed = run(installed / "diffdistill", cwd=tmp_path)
    assert all(f"  {name} " in listed for name in names)
    given = ["model=digits-student-4", "w=1", "num_samples=10", "device=cpu", "out=x"]
    assert "x/samples.npz" in run(installed / "diffdistill", "sample", *given, cwd=tmp_path)
    with np.load(tmp_path / "x/samples.npz") as file:
        assert file["x"].shape == (10, 1, 8, 8) and file["y"].tolist() == list(range(10))


@pytest.mark.slow
def test_the_quickstart_of_the_wheel(installed, tmp_path):
    tiny = [f"+stage{n}.trainer.{setting}" for n in (1, 2) for setting in ("updates=1", "batch_size=8", "device=cpu")]
    tiny += ["+stage2.start_steps=32", *(f"+stage2.stages.{n}.updates=1" for n in (16, 8, 4, 2, 1))]
    tiny += ["table.num_samples=50", "table.rows.0.num_steps=2", "table.rows.1.num_steps=2", "device=cpu"]
    printed = run(installed / "python", "-m", "diffdistill", "quickstart", *tiny, cwd=tmp_path)
    assert "student, 1 step" in printed
    assert (tmp_path / "runs/quickstart/table/index.html").is_file()
    stages = tmp_path / "runs/quickstart/stage2/stages"
    metadata = (stages / "001/model.safetensors").read_bytes()
    head = json.loads(metadata[8 : 8 + int.from_bytes(metadata[:8], "little")])
    assert "python -m diffdistill quickstart" in str(head["__metadata__"])
