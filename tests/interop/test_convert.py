"""The command line: `scripts/convert.py SOURCE DEST`."""

import subprocess
import sys
from pathlib import Path

import torch

import diffdistill
from tests.interop.test_edm import written
from tests.scripts.calling import call

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_convert_says_what_it_found_and_writes_a_file_of_ours(tmp_path):
    source = written(tmp_path / "it's a model.pkl", "ddpmpp_edm_cond")
    result = run(source, tmp_path / "ours.safetensors")
    assert result.returncode == 0, result.stderr
    assert "SongUNet in EDMPrecond, 3x8x8, 4 classes" in result.stdout
    ours, theirs = diffdistill.load_denoiser(tmp_path / "ours.safetensors"), diffdistill.load_denoiser(source)
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.equal(ours(x, sigma, y), theirs(x, sigma, y))


def test_what_cannot_be_converted_ends_in_one_line_and_code_2(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    result = call("convert", f"source={tmp_path / 'x.pkl'}", f"dest={tmp_path / 'y.safetensors'}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and "os.system" in result.stderr
    assert not (tmp_path / "y.safetensors").exists()
