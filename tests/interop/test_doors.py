"""Every public door opens every kind of file, whatever was imported before."""

import subprocess
import sys

import pytest

from diffdistill.models import save_denoiser
from tests.builders import tiny_denoiser
from tests.interop.test_edm import written

DOORS = ("diffdistill", "diffdistill.models", "diffdistill.models.loading")
PROGRAM = """
import sys
from {door} import load_denoiser
print(*(type(load_denoiser(path)).__name__ for path in sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each form: ours by itself and in a folder, a pickle of EDM, and a folder of diffusers."""
    folder = tmp_path_factory.mktemp("files")
    ours = folder / "ours.safetensors"
    save_denoiser(tiny_denoiser(), ours)
    save_denoiser(tiny_denoiser(), folder / "run")
    found = [ours, folder / "run", written(folder / "edm.pkl", "ddpmpp_edm_cond")]
    try:
        import diffusers
    except ImportError:
        return found
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "pipeline")
    return [*found, folder / "pipeline"]


@pytest.mark.parametrize("door", DOORS)
def test_a_fresh_process_loads_every_kind_of_file(door, files):
    program = [sys.executable, "-c", PROGRAM.format(door=door), *map(str, files)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NetworkDenoiser"] * len(files)
