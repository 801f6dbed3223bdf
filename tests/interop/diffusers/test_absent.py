"""Without the extra: everything else works, and what needs it says so in one sentence."""

import subprocess
import sys

import pytest

BLOCK = "import sys; sys.modules['diffusers'] = None\n"
USES = {
    "folder": "from diffdistill import load_denoiser; load_denoiser(sys.argv[1])",
    "network": "from diffdistill.interop.diffusers.networks import UNet2D; UNet2D({})",
    "scheduler": "import diffdistill.interop.diffusers.scheduler",
}


@pytest.mark.parametrize("use", USES)
def test_one_sentence_names_the_extra(use, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", BLOCK + USES[use], tmp_path], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'pip install "diffdistill[diffusers]"' in done.stderr.strip().splitlines()[-1]


def test_the_rest_works():
    code = "from diffdistill import load_denoiser; import diffdistill.editing; load_denoiser('digits-teacher')"
    done = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
