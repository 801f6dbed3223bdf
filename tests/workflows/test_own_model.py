"""A U-Net of some sixty lines in a file outside the repository: all that can be done with it, in ten lines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SETTINGS = 'FAST = {"updates": 3, "batch_size": 8, "warmup": 1, "device": "cpu"}\n'
LINES = """\
import diffdistill, own_unet, torch
data = diffdistill.load_data("digits", split="train")
betas = torch.linspace(1e-4, 0.05, 400)
net = diffdistill.wrap(own_unet.UNet(), "eps", betas=betas, data_shape=(1, 8, 8), num_classes=10)
teacher = diffdistill.train_teacher(net, data, out="teacher", trainer=FAST)
solver = diffdistill.train_solver(teacher, num_steps=2, w=1.0, out="solver", trainer=FAST)
guided = diffdistill.distill_guidance(teacher, data, w_range=(0.0, 4.0), out="guided", trainer=FAST)
student = diffdistill.distill_steps(guided, data, start_steps=16, last_steps=4, trainer=FAST)
diffdistill.save_denoiser(student, "student.safetensors")
x, fast = diffdistill.sample(student, 4, w=2.0), diffdistill.sample(teacher, 4, solver=solver, w=1.0)
"""
AGAIN = """\
import diffdistill, json, own_unet, torch
learned = {"name": "learned", "predictor": "solver"}
x = diffdistill.sample("student.safetensors", 4, w=2.0)
fast = diffdistill.sample("teacher", 4, solver=learned, w=1.0)
plain = diffdistill.sample("teacher", 4, solver="dpmpp", num_steps=4)
print(json.dumps([x.tolist(), fast.tolist(), list(plain.shape)]))
"""


def run(program, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the network lies, and what the ten lines made of it."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(HERE / "own_unet.py", folder)
    result = run(SETTINGS + LINES + "import json\nprint(json.dumps([x.tolist(), fast.tolist()]))", folder)
    assert result.returncode == 0, result.stderr
    (folder / "printed.json").write_text(result.stdout)
    return folder


def test_ten_lines_make_all_of_it_and_a_fresh_process_has_the_same(folder):
    assert LINES.count("\n") == 10 and (HERE / "own_unet.py").read_text().count("\n") <= 64
    result = run(AGAIN, folder)
    assert result.returncode == 0, result.stderr
    x, fast, shape = json.loads(result.stdout)
    assert [x, fast] == json.loads((folder / "printed.json").read_text())
    assert shape == [4, 1, 8, 8]


def test_without_its_module_a_file_says_what_is_missing(folder):
    result = run('import diffdistill; diffdistill.load_denoiser("student.safetensors")', folder)
    assert "holds the network 'own_unet', which is not registered here: import the module" in result.stderr
