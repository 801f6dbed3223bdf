"""Noise levels are those of the model where nothing is said, and pictures that cannot be drawn end no run."""

import pytest
import torch

from diffdistill.models import save_denoiser
from diffdistill.sampling import generation
from diffdistill.sampling.plans import schedule_for
from diffdistill.training.run import read_metrics
from diffdistill.workflows.levels import noise_levels_for
from tests.builders import tiny_denoiser
from tests.scripts.calling import call

from common.configs import compose, plain  # isort: skip

QUICK = ["trainer.updates=2", "trainer.batch_size=4", "trainer.device=cpu", "trainer.log_every=1"]


@pytest.fixture
def teacher(tmp_path):
    """The file of a teacher for digits whose noise ends at 7.5."""
    denoiser = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10, sigma_max=7.5)
    save_denoiser(denoiser, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def test_stage_1_draws_its_noise_from_the_range_of_the_teacher():
    settings = plain(compose("distill_guidance", []))["noise_levels"]
    draw = noise_levels_for(tiny_denoiser(sigma_min=0.03, sigma_max=7.5), settings)
    sigma = draw(4000, torch.Generator().manual_seed(0))
    assert 0.03 <= sigma.min() < 0.04 and 7 < sigma.max() <= 7.5


def test_levels_outside_the_range_are_a_warning(teacher, tmp_path):
    given = [f"teacher={teacher}", f"out={tmp_path / 'x'}", *QUICK, "preview=null", "noise_levels.sigma_max=80"]
    with pytest.warns(UserWarning, match=r"from 0.002 to 80 lie outside those of the model, 0.002 to 7.5"):
        done = call("distill_guidance", *given)
    assert done.returncode == 0, done.stderr
    with pytest.warns(UserWarning, match=r"begin at 20, above 7.5, the highest of the model"):
        schedule_for(tiny_denoiser(sigma_max=7.5), {"name": "polynomial", "num_steps": 3, "sigma_max": 20.0})


def test_a_preview_that_cannot_be_drawn_does_not_end_a_run(teacher, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such picture\nwith details")

    monkeypatch.setattr(generation, "generate", fails)
    done = call("distill_guidance", f"teacher={teacher}", f"out={tmp_path / 'x'}", *QUICK, "trainer.sample_every=1")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "no such picture" in line]
    assert said == ["no samples are drawn from here on, because drawing them failed: no such picture"]
    assert len(read_metrics(tmp_path / "x/metrics.jsonl")) == 2


def test_a_command_that_failed_leaves_nothing_that_the_corrected_one_trips_over(teacher, tmp_path):
    quick = [f"teacher={teacher}", f"out={tmp_path / 'x'}", *QUICK, "preview=null", "start_steps=4"]
    done = call("distill_steps", *quick, "weighting=snr_plus_one", "trainer.device=meta")
    assert done.returncode == 2 and "meta" in done.stderr
    done = call("distill_steps", *quick, "last_steps=2")
    assert done.returncode == 0, done.stderr
