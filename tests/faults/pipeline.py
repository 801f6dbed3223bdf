"""Stage 1 and stage 2, tiny, by the functions of the scripts, in a process that can be killed at any update."""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from diffdistill.training import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import distill_guidance
import distill_steps
from common import compose

STAGES = ("stage1", "stage2/stages/002", "stage2/stages/001")


def both_stages(pipe, folder, updates, die_in_save):
    """Report every update on the pipe, "done" at the end, and the traceback of an error."""
    torch.set_num_threads(1)
    step = Trainer._step

    def reporting_step(self, batch):
        step(self, batch)
        pipe.send(1)

    Trainer._step = reporting_step
    if die_in_save:
        torch.save = die_while_writing
    quick = [f"trainer.updates={updates}", "trainer.checkpoint_every=2", "trainer.log_every=2", "trainer.batch_size=8"]
    quick += ["preview.num_samples=4", "trainer.warmup=2", "trainer.device=cpu", "trainer.sample_every=null"]
    stage1 = [f"teacher={folder / 'teacher.safetensors'}", f"out={folder / 'stage1'}", *quick]
    stage2 = [f"teacher={folder / 'stage1'}", f"out={folder / 'stage2'}", "start_steps=4", "stages=null", *quick]
    try:
        distill_guidance.distill(compose("distill_guidance", stage1))
        distill_steps.distill(compose("distill_steps", stage2))
        pipe.send("done")
    except Exception:
        pipe.send(traceback.format_exc())


def die_while_writing(state, path, save=torch.save):
    """Write half of a checkpoint and be killed."""
    save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
