"""What the comparisons with stock pipelines share."""

import torch

from diffdistill.denoiser import Distilled
from diffdistill.interop.diffusers.levels import sigma_table
from diffdistill.models import guidance_student
from diffdistill.solvers import make_schedule
from tests.interop.diffusers.builders import diffusers, scheduler

PROMPTS = ["a cat", "dog"]


def grid(num_steps):
    return make_schedule("trailing", num_steps=num_steps, table=sigma_table(scheduler()))


def student_of(teacher, sigmas=None, sampler="deterministic"):
    """A student whose answer depends on w."""
    student = guidance_student(teacher.denoiser, (0.0, 14.0))
    torch.manual_seed(3)
    torch.nn.init.normal_(student.model.module.time_embedding.cond_proj.weight, std=0.3)
    student.distilled = None if sigmas is None else Distilled(tuple(sigmas.tolist()), sampler)
    return student.eval()


def components(pipe, kind):
    made = getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
