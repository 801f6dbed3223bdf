"""`UNet2DModel`: the class that stands for none, by `diffdistill convert`; students without classes, out."""

import pytest
import torch

from diffdistill import load_denoiser
from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers import export_student, load_pipeline
from diffdistill.models import guided, save_denoiser
from diffdistill.solvers import Euler, sample
from diffdistill.solvers.schedules import trailing
from tests.interop.diffusers.builders import diffusers, filled, pipeline, unet, unet_2d
from tests.scripts.calling import call


def saved(folder, **network):
    """A DDPM pipeline in a folder."""
    levels = diffusers.DDPMScheduler(clip_sample=False)
    pipeline = diffusers.DDPMPipeline(filled(unet_2d(sample_size=8, **network)), levels)
    pipeline.save_pretrained(folder)
    return folder


def test_convert_says_which_class_stands_for_none(tmp_path):
    folder, file = saved(tmp_path / "classes", num_class_embeds=5), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"diffdistill convert FOLDER FILE hints.null_class=ROW"):
        load_denoiser(folder).null_condition(torch.tensor([0]))
    done = call("convert", f"source={folder}", f"dest={file}", "hints.null_class=4")
    assert done.returncode == 0, done.stderr
    model = load_denoiser(file)
    assert model.num_classes == 4
    x, sigma, y = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 2.0, 30.0]), torch.tensor([0, 3, 1])
    plain = load_pipeline(folder).denoiser  # whose row 4 is a class like others
    with torch.no_grad():
        with_class, without = plain(x, sigma, y), plain(x, sigma, torch.full((3,), 4))
        torch.testing.assert_close(guided(model, 2.0)(x, sigma, y), 3 * with_class - 2 * without, rtol=1e-3, atol=1e-3)
    done = call("convert", f"source={folder}", f"dest={file}", "hints.image_size=8")
    assert done.returncode == 2 and "hints.image_size has no effect on a diffusers folder" in done.stderr


def test_a_student_without_classes_runs_in_the_stock_pipeline(tmp_path):
    teacher = load_pipeline(saved(tmp_path / "teacher", num_class_embeds=None))
    student = teacher.denoiser
    levels = trailing(num_steps=4, table=student.table.cpu())
    student.distilled = Distilled(tuple(levels.tolist()), "deterministic")
    save_denoiser(student, tmp_path / "student.safetensors")
    done = call("export", f"model={tmp_path}/student.safetensors", f"teacher={tmp_path}/teacher", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    stock.set_progress_bar_config(disable=True)
    made = stock(2, generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        # The stock pipeline begins with noise of standard deviation 1 in its own units, which are sqrt(1 + sigma^2).
        start = noise * float((1 + levels[0] ** 2).sqrt() / levels[0])
        mine = sample(student, start, solver=Euler(), sigmas=levels)
    expected = (mine.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.as_tensor(made), expected, rtol=1e-3, atol=1e-3)
    back = load_denoiser(tmp_path / "out")
    assert back.distilled.num_steps == 4 and back.w_range is None
    assert "num_inference_steps=4" in (tmp_path / "out/README.md").read_text()


def test_a_student_of_classes_is_refused(tmp_path):
    teacher = load_pipeline(saved(tmp_path / "teacher", num_class_embeds=5))
    with pytest.raises(ValueError, match="of UNet2DModel those without classes"):
        export_student(teacher.denoiser, teacher, tmp_path / "out")


def test_convert_says_how_a_network_takes_the_guidance_weight(tmp_path):
    pipeline(network=unet(w_channels=256)).save_pretrained(tmp_path / "lcm")
    given = [f"source={tmp_path / 'lcm'}", f"dest={tmp_path / 'lcm.safetensors'}"]
    done = call("convert", *given)
    assert done.returncode == 2 and "does not say in which convention" in done.stderr
    done = call("convert", *given, "hints.guidance_convention=w")
    assert done.returncode == 0, done.stderr
    assert load_denoiser(tmp_path / "lcm.safetensors").w_range == (0.0, 14.0)
