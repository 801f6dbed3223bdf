"""Tasks of a Slurm step join as those of torchrun do, and the signal before a time limit is passed on after a stop."""

import contextlib
import os
import signal
import socket

import pytest

from diffdistill.distributed import (
    LostProcessError,
    first_host,
    gather,
    processes,
    rank,
    slurm_place,
    world_size,
)
from diffdistill.training import signals
from diffdistill.training.signals import Interrupted, StopRequest
from tests.training.several import CONTEXT

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
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
        ("rack[1-2]n[01-03],x", "rack1n01"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_the_place_of_a_task_in_a_step():
    place = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu003", "MASTER_PORT": "17474"}
    assert slurm_place(STEP) == place
    assert slurm_place({**STEP, "RANK": "2"}) == {}, "torchrun, started once on each node, has said it already"
    assert slurm_place({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == slurm_place({}) == {}
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert slurm_place({**STEP, **given}) == {**place, **given}


def test_steps_at_the_same_time_have_ports_of_their_own():
    steps = [{"SLURM_JOB_ID": str(7 + job), "SLURM_STEP_ID": str(step)} for job in range(99) for step in range(9)]
    ports = {int(slurm_place({**STEP, **step})["MASTER_PORT"]) for step in steps}
    assert len(ports) == len(steps) and max(ports) < 32_768


def test_a_port_in_use_is_an_error_of_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = {**STEP, "SLURM_PROCID": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        monkeypatch.setattr(os, "environ", {**os.environ, **given})
        with pytest.raises(LostProcessError, match=f"MASTER_ADDR=localhost MASTER_PORT={port}"), processes():
            pass


def task(pipe, step):
    os.environ.update(step)
    with processes():
        pipe.send((rank(), world_size(), gather(10 * rank())))


def test_the_tasks_of_a_step_join():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
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
        assert stop.signum == signums[-1]
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


@pytest.mark.parametrize(
    ("shown", "back"),
    [
        ("JobId=7 JobState=RUNNING PreemptTime=2026-11-27T23:26:06", True),
        ("JobId=8 JobState=RUNNING PreemptTime=None\nJobId=7 JobState=RUNNING PreemptTime=2026-11-27T23:26:06", True),
        ("JobId=7 JobState=CANCELLED PreemptTime=2026-11-27T23:26:06", False),
        ("JobId=7 JobState=RUNNING PreemptTime=None\nJobId=8 JobState=RUNNING PreemptTime=2026-11-27T23:26:06", False),
        ("", False),
    ],
)
def test_a_job_goes_back_after_sigterm_if_slurm_wants_its_place(shown, back, requeued, monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)
    try:
        with pytest.raises(Interrupted):
            stopped_by([signal.SIGTERM], requeued)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert requeued == ([signal.SIGUSR2] if back else [])


def test_other_processes_of_a_job_leave_without_an_error(requeued, monkeypatch):
    monkeypatch.setattr(signals, "rank", lambda: 1)
    with pytest.raises(SystemExit) as end:
        stopped_by([signal.SIGUSR2], requeued)
    assert end.value.code == 0 and not requeued


def test_a_signal_that_nobody_took_acts_as_usual_in_the_end(requeued):
    with StopRequest():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not requeued
    assert requeued == [signal.SIGUSR2]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    with contextlib.suppress(ValueError), StopRequest():
        os.kill(os.getpid(), signal.SIGUSR2)
        raise ValueError("an error, which comes first")
    assert requeued == [signal.SIGUSR2]


def test_without_a_job_the_signal_is_left_alone():
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
