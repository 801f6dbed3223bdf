"""Functions run by several processes of torch.distributed on the CPU, forked from one that has imported the package."""

import io
import multiprocessing
import os
import socket
import traceback

import torch

from diffdistill.distributed import processes

SECONDS = 900
"""How long the processes may take, and may wait for each other."""
CONTEXT = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = ["torch._dynamo", "torch.distributed.fsdp"]  # which training would do in every process
CONTEXT.set_forkserver_preload(["tests.training.test_processes", "tests.faults.pipeline", *SLOW_IMPORTS])


def several(count, function, *args):
    """What `function(*args)` returns in each of `count` processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children = [], []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe()
        child = CONTEXT.Process(target=_child, args=(theirs, rank, count, port, function, args))
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    try:
        answers = [pipe.recv() if pipe.poll(SECONDS) else ("no answer", None) for pipe in pipes]
    finally:
        for child in children:
            child.join(20)
            child.kill()
    for error, _ in answers:
        assert error is None, error
    return [torch.load(io.BytesIO(value)) for _, value in answers]


def _child(pipe, rank, count, port, function, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with processes():
            value = io.BytesIO()
            torch.save(function(*args), value)  # a tensor sent as such would lie in memory that ends with this process
            pipe.send((None, value.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
