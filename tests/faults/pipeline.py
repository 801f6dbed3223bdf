"""Stage 1 and stage 2, tiny, by the functions of the scripts, in processes that can be killed at any update."""

import contextlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from diffdistill.distributed import processes
from diffdistill.training import Trainer, callbacks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import common.errors
import distill_guidance
import distill_steps
from common.configs import compose

STAGES = ("stage1", "stage2/stages/002", "stage2/stages/001")


def alone(pipe, *args):
    """`both_stages`, then "done", or the traceback of an error."""
    try:
        both_stages(pipe, *args)
        pipe.send("done")
    except Exception:
        pipe.send(traceback.format_exc())


def one_of_several(pipe, place, parallel, *args):
    """`both_stages` as one of several processes, then what it printed on stderr."""
    os.environ.update(place)
    # Not Adam, which makes steps of full length of gradients that are rounding noise.
    settings = ["trainer.optimizer=sgd", "trainer.learning_rate=0.03", "trainer.precision=fp32"]
    settings += [f"trainer.parallel={parallel}"]
    common.errors.SAME_ERROR_SECONDS = 0.1
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), common.errors.errors_in_one_line(), processes():
            both_stages(pipe, *args, settings)
    finally:
        pipe.send(errors.getvalue())


def both_stages(pipe, folder, updates, die_in_save, settings=()):
    """Run or continue both stages; every update sends 1."""
    torch.set_num_threads(1)
    step = Trainer._step

    def reporting_step(self, batch):
        step(self, batch)
        pipe.send(1)

    Trainer._step = reporting_step
    callbacks.plot_curves = lambda metrics, path: None  # which takes longer than the rest
    if die_in_save:
        torch.save = die_while_writing
    quick = [f"trainer.updates={updates}", "trainer.checkpoint_every=2", "trainer.log_every=2", "trainer.batch_size=8"]
    quick += ["preview.num_samples=4", "trainer.warmup=2", "trainer.device=cpu", "trainer.sample_every=null", *settings]
    stage1 = [f"teacher={folder / 'teacher.safetensors'}", f"out={folder / 'stage1'}", *quick]
    stage2 = [f"teacher={folder / 'stage1'}", f"out={folder / 'stage2'}", "start_steps=4", "stages=null", *quick]
    distill_guidance.distill(compose("distill_guidance", stage1))
    distill_steps.distill(compose("distill_steps", stage2))


def die_while_writing(state, path, save=torch.save):
    """Write half of a checkpoint and be killed."""
    save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
