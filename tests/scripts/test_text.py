"""`diffdistill sample prompt=...` of text models, decoded."""

import numpy as np
import pytest
import torch

from tests.scripts.calling import call

pytest.importorskip("diffusers")

from diffdistill.interop.diffusers import load_pipeline  # noqa: E402
from diffdistill.sampling.plans import plan  # noqa: E402
from diffdistill.solvers import sample, seeded_noise  # noqa: E402
from tests.interop.diffusers.builders import pipeline  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stable Diffusion with random weights."""
    path = tmp_path_factory.mktemp("text") / "model"
    pipeline().save_pretrained(path)
    return path


def drawn(folder, out, *overrides):
    given = [f"model={folder}", "num_steps=2", "device=cpu", "w=1.5", f"out={out}", "save=[npz,png]"]
    done = call("sample", *given, *overrides)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return torch.from_numpy(file["x"])


def test_prompts_are_repeated_and_what_they_lead_to_is_decoded(folder, tmp_path):
    x = drawn(folder, tmp_path / "x", 'prompt=["a b","c d e"]', "num_samples=3", "batch_size=2")
    assert len(list((tmp_path / "x/png").iterdir())) == 3
    parts = load_pipeline(folder)
    planned = plan(parts.denoiser, w=1.5, num_steps=2)
    with torch.no_grad():
        cond = parts.prompts(["a b", "c d e", "a b"])
        noise = seeded_noise(range(3), parts.denoiser.data_shape)
        latents = sample(planned.denoiser, noise, solver=planned.solver, sigmas=planned.sigmas, cond=cond)
        torch.testing.assert_close(x, parts.codec.decode(latents).clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_one_prompt_and_another_differ(folder, tmp_path):
    one, other = (drawn(folder, tmp_path / name, f'prompt="{name}"', "num_samples=1") for name in ("ab", "dc"))
    assert (one - other).abs().max() > 1e-4


def test_text_and_labels_are_for_models_that_take_them(folder, tmp_path):
    given = [f"model={folder}", "num_steps=2", f"out={tmp_path / 'x'}"]
    assert "give prompt=, and no labels" in call("sample", *given).stderr
    assert "give prompt=, and no labels" in call("sample", *given, "prompt=a", "labels=[1]").stderr
    assert "takes no text" in call("sample", "model=digits-student-1", f"out={tmp_path / 'x'}", "prompt=a").stderr
