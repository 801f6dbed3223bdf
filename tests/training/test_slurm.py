"""Tasks of a Slurm step join as those of torchrun do, and the signal before a time limit is passed on after a stop."""

import contextlib
import os
import signal

import pytest

from diffdistill.training.distributed import first_host, gather, processes, rank, slurm_place, world_size
from diffdistill.training.signals import Interrupted, StopRequest
from tests.training.several import CONTEXT

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[003-007,012],login", "gpu003"),
        ("gpu[12,14]", "gpu12"),
        ("rack2-gpu[7-9]-ib,x", "rack2-gpu7-ib"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_the_place_of_a_task_in_a_step():
    place = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu003", "MASTER_PORT": "23456"}
    assert slurm_place(STEP) == place
    assert slurm_place({**STEP, "RANK": "2"}) == {}, "torchrun, started once on each node, has said it already"
    assert slurm_place({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == slurm_place({}) == {}


def task(pipe, step):
    os.environ.update(step)
    with processes():
        pipe.send((rank(), world_size(), gather(10 * rank())))


def test_the_tasks_of_a_step_join():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    pipes, children = [], []
    for place in ("0", "1"):
        ours, theirs = CONTEXT.Pipe()
        given = {**step, "SLURM_PROCID": place, "SLURM_LOCALID": place}
        children.append(CONTEXT.Process(target=task, args=(theirs, given)))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    assert [pipe.recv() for pipe in pipes] == [(0, 2, [0, 10]), (1, 2, [0, 10])]
    for child in children:
        child.join(30)


@pytest.fixture
def requeued():
    """The signals that submitit's handler, which puts a job into the queue again, has seen."""
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: seen.append(signum))
    yield seen
    signal.signal(signal.SIGUSR2, before)


def stopped_by(signums, requeued):
    with StopRequest() as stop:
        for signum in signums:
            os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGUSR2
        assert not requeued, "before the checkpoint"
        raise Interrupted(stop.signum)


@pytest.mark.parametrize("first", [[], [signal.SIGTERM]])
def test_a_job_is_requeued_after_its_checkpoint(requeued, first):
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)  # as submitit does
    try:
        with pytest.raises(Interrupted):
            stopped_by([*first, signal.SIGUSR2], requeued)
        assert requeued == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_nobody_took_acts_as_usual_in_the_end(requeued):
    with StopRequest():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not requeued
    assert requeued == [signal.SIGUSR2]
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
    with contextlib.suppress(ValueError), StopRequest():
        os.kill(os.getpid(), signal.SIGUSR2)
        raise ValueError("an error, which comes first")
    assert requeued == [signal.SIGUSR2]


def test_without_a_job_the_signal_is_left_alone():
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
