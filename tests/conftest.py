"""Tests compute on few threads, so that several can run beside each other, and start from one seed."""

import os

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # the processes share the cores, and so do those that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1 if WORKER else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
