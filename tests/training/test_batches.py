import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdistill.training import Run, Trainer
from diffdistill.training.batches import Batches, SampleOrder
from diffdistill.training.randomness import BatchGenerator, rand, randint, randn, seed_from
from tests.training.problems import Fit, HeldRows, Rows, settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(("length", "batch"), [(37, 12), (5, 12), (12, 12)])
def test_every_epoch_sees_every_sample_once_from_any_update_on(length, batch):
    def updates(seed):
        order = SampleOrder(length, batch, seed=seed)
        return torch.cat([order.indices(k) for k in range(length)])

    stream = updates(4)
    for epoch in stream.split(length)[:batch]:
        assert sorted(epoch.tolist()) == list(range(length))
    assert not torch.equal(stream[:length], stream[length : 2 * length])
    assert not torch.equal(stream, updates(5))
    for k in (4, 2, 3):  # in any order, without what came before
        assert torch.equal(SampleOrder(length, batch, seed=4).indices(k), stream[k * batch : (k + 1) * batch])


@pytest.mark.parametrize("data", [Rows(), HeldRows()])
def test_batches_start_at_any_update_and_split_over_processes_by_place(data):
    def rows(start, stop, updates):
        return list(Batches(data, 12, 0, rows=slice(start, stop), device=CPU)(updates))

    whole = rows(0, 12, range(7))
    assert torch.equal(whole[3]["x"], data.x[whole[3]["index"]])
    assert torch.equal(rows(0, 12, range(5, 7))[1]["index"], whole[6]["index"])
    halves = [rows(0, 6, range(7))[4], rows(6, 12, range(7))[4]]
    assert torch.equal(torch.cat([h["x"] for h in halves]), whole[4]["x"])


def test_without_data_a_batch_holds_the_numbers_of_its_samples():
    batches = Batches(None, 12, 0, rows=slice(4, 8), device=CPU)
    assert [b["index"].tolist() for b in batches(range(2, 4))] == [[28, 29, 30, 31], [40, 41, 42, 43]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda n, g: randn((n, 3, 2), g),
        lambda n, g: rand((n,), g, dtype=torch.float64),
        lambda n, g: randint(100, (n, 5), g),
    ],
)
def test_a_batch_draws_the_same_numbers_however_it_is_split(draw):
    def drawn(parts):
        generators = [BatchGenerator(CPU, i * (12 // parts), 12 // parts, 12).reseed(7, 1) for i in range(parts)]
        return [torch.cat([draw(12 // parts, g) for g in generators]) for _ in range(2)]

    first, second = drawn(1)
    assert not torch.equal(first, second)
    for parts in (2, 3, 12):
        assert torch.equal(drawn(parts)[0], first) and torch.equal(drawn(parts)[1], second)
    plain = torch.Generator().manual_seed(seed_from(7, 1, 0))
    assert torch.equal(draw(12, plain), first)


def test_parts_that_draw_with_torch_itself_have_streams_of_their_own():
    parts = [BatchGenerator(CPU, start, 6, 12).reseed(7, 1) for start in (0, 6)]
    draws = [torch.randn(6, generator=g) for g in parts]
    assert not torch.equal(draws[0], draws[1])
    with pytest.raises(ValueError, match="6 rows in this part of the batch, not 5"):
        randn((5,), parts[0])


WORKER = """
import sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from tests.training.problems import Fit, HeldRows, settings
import diffdistill.distributed as distributed
from diffdistill.training import Run, Trainer
distributed.BUCKET_BYTES = 100
dist.init_process_group("gloo", init_method="file://" + {rendezvous!r}, rank=int(sys.argv[1]), world_size=2)
torch.set_num_threads(1)
config = settings(updates=int(sys.argv[2]), decay="constant")
Trainer(Fit(dropout=0.0), HeldRows(), config, Run({out!r}, {{}})).train()
dist.destroy_process_group()
"""


def test_two_processes_train_as_one_does_and_continue_what_one_began(tmp_path):
    def alone(path, updates):
        run = Run(path, {})
        trainer = Trainer(Fit(dropout=0.0), HeldRows(), settings(updates=updates, decay="constant"), run)
        trainer.train()
        return trainer, [r["loss"] for r in run.metrics()]

    def together(path, updates):
        script = WORKER.format(
            root=str(Path(__file__).parents[2]), rendezvous=str(tmp_path / f"r{updates}"), out=str(path)
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(i), str(updates)], env=environment) for i in range(2)
        ]
        assert [p.wait(timeout=120) for p in processes] == [0, 0]

    expected, losses = alone(tmp_path / "one", 20)
    alone(tmp_path / "two", 10)
    together(tmp_path / "two", 20)
    trainer, resumed = alone(tmp_path / "two", 20)
    assert resumed == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(trainer.model.state_dict(), expected.model.state_dict(), rtol=1e-4, atol=1e-6)
