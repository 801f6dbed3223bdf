"""Runs of several processes that are killed, all at once or one of them, go on to what uninterrupted ones end in."""

import os
import random
import shutil
import signal
import socket
import time
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch

from diffdistill import distributed
from tests.faults.pipeline import one_of_several
from tests.faults.test_kills import fresh, result
from tests.training.several import CONTEXT

NEEDS_FSDP = pytest.mark.skipif(torch.__version__ < "2.7", reason="parallel=fsdp needs a later PyTorch")
SECONDS = 120
"""How long survivors may take to end: they are slow beside other tests, but no half hour."""


def places(count):
    """What `torchrun` sets for each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def attempt(folder, updates, parallel, *, count=2, victims=(), after=0, delay=0.0, dies_in_save=None):
    """Run or continue both stages; the exit codes, and what each process said.

    The victims are killed after some updates, or the one that dies in the writing of a checkpoint kills itself.
    """
    pipes, children = [], []
    for rank, place in enumerate(places(count)):
        ours, theirs = CONTEXT.Pipe()
        args = (theirs, place, parallel, folder, updates, rank == dies_in_save)
        children.append(CONTEXT.Process(target=one_of_several, args=args))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    said, seen, left = [""] * count, 0, set(pipes)
    try:
        while left:
            ready = wait(left, SECONDS)
            assert ready, f"no word for {SECONDS} s; until now {said}"
            for pipe in ready:
                try:
                    word = pipe.recv()
                except EOFError:
                    left.remove(pipe)
                    continue
                if word != 1:
                    said[pipes.index(pipe)] = word
                    continue
                seen += pipe is pipes[0]
                if victims and dies_in_save is None and seen == after:
                    time.sleep(delay)
                    for victim in victims:
                        os.kill(children[victim].pid, signal.SIGKILL)
                    victims = ()
    finally:
        for child in children:
            child.join(20)
            child.kill()
    return [child.exitcode for child in children], said


def survived(codes, said, victims):
    """Check how the processes ended that were not killed."""
    for rank, (code, line) in enumerate(zip(codes, said, strict=True)):
        if rank in victims:
            assert code == -signal.SIGKILL
        else:
            who = f" in process {rank}" if rank else ""
            assert code == 2 and line.startswith(f"error{who}: another process ended or cannot be reached ("), line
            assert len(line.splitlines()) == 1 and "gloo" not in line and "Connection" in line


def losses(folder):
    return [record["loss"] for record in result(folder)[1]]


def check(path, updates, parallel, kills, counts):
    """Kill two processes as `kills` say, and go on with two to the same bits, and with `counts` to the same losses."""
    assert attempt(fresh(path / "whole"), updates, parallel) == ([0, 0], ["", ""])
    weights, metrics = result(path / "whole")
    folder = fresh(path / "killed")
    for victims, how in kills:
        survived(*attempt(folder, updates, parallel, victims=victims, **how), victims)
    shutil.copytree(folder, path / "interrupted")
    assert attempt(folder, updates, parallel) == ([0, 0], ["", ""])
    assert result(folder)[1] == metrics and len(metrics) == 3 * updates // 2
    torch.testing.assert_close(result(folder)[0], weights, rtol=0, atol=0)
    for count in counts:
        shutil.rmtree(folder)
        shutil.copytree(path / "interrupted", folder)
        assert attempt(folder, updates, parallel, count=count) == ([0] * count, [""] * count)
        np.testing.assert_allclose(losses(folder), losses(path / "whole"), rtol=1e-5)


def in_save(rank):
    """A kill inside the writing of a checkpoint or of a part of it."""
    return (rank,), {"dies_in_save": rank}


def test_kills_of_two_processes_change_nothing(tmp_path):
    check(tmp_path, 4, "ddp", [((0, 1), {"after": 3}), in_save(0), ((1,), {"after": 2})], [])


@NEEDS_FSDP
def test_kills_of_two_processes_that_share_the_weights_change_nothing(tmp_path):
    check(tmp_path, 4, "fsdp", [((0, 1), {"after": 3}), in_save(1), ((0,), {"after": 2})], [1])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=NEEDS_FSDP)])
def test_many_kills_of_two_processes_change_nothing(tmp_path, parallel):
    rng, kills = random.Random(parallel), [in_save(0), in_save(1)] if parallel == "fsdp" else [in_save(0)]
    for _ in range(9):  # at most the updates that there are for each, so that no attempt runs to the end
        how = {"after": rng.randint(1, 6), "delay": 0.05 * rng.random()}
        kills.append((rng.choice([(0,), (1,), (0, 1)]), how))
    rng.shuffle(kills)
    check(tmp_path, 24, parallel, kills, [1, 4])


def started(pipe, place):
    """What a process says that joins the others of its place."""
    os.environ.update(place)
    distributed.JOIN_MINUTES = 0.01
    try:
        with distributed.processes():
            pipe.send("joined")
    except distributed.LostProcessError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("here", [0, 1])
def test_a_process_that_never_starts_is_not_waited_for(here):
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=started, args=(theirs, places(2)[here]))
    child.start()
    assert ours.poll(SECONDS) and "another process ended or cannot be reached (" in ours.recv()
    child.join(20)
