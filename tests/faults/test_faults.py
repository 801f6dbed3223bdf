"""What goes wrong under a run ends in one clear line, and the last good state is kept."""

import os
import resource
import shutil
import signal

import pytest
import torch
from torch.utils.data import get_worker_info

from diffdistill.models import save_denoiser
from diffdistill.reports.plots import plot_curves
from diffdistill.training import CheckpointError, DataError, NonFiniteLossError, Run, Trainer
from tests.builders import tiny_denoiser
from tests.training.problems import Fit, HeldRows, Rows, settings
from tests.training.several import CONTEXT


def ends(path, error, data=None, **changes):
    """Train until the error comes; its message, one line, and the last good checkpoint."""
    run = Run(path, {})
    with pytest.raises(error) as caught:
        Trainer(Fit(), data or HeldRows(), settings(**changes), run).train()
    assert "\n" not in str(caught.value)
    return str(caught.value), run.load_checkpoint()


class Files(Rows):
    """Rows that lie in a file each."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        folder.mkdir()
        for i, row in enumerate(self.x):
            torch.save(row, folder / f"{i}.pt")

    def __getitem__(self, index):
        return {"x": torch.load(self.folder / f"{index}.pt")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_file_that_vanishes(tmp_path, workers):
    data = Files(tmp_path / "data")
    Trainer(Fit(), data, settings(updates=12), Run(tmp_path / "run", {})).train()
    (tmp_path / "data/7.pt").unlink()
    line, checkpoint = ends(tmp_path / "run", DataError, data, updates=30, workers=workers)
    assert "data of update" in line and "7.pt" in line and "No such file" in line
    assert line.endswith(f"the last good checkpoint is {checkpoint.path}")
    assert checkpoint.update >= 12


class KillsWorker(Rows):
    def __getitem__(self, index):
        if get_worker_info() is not None and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies(tmp_path):
    Trainer(Fit(), Rows(), settings(updates=6), Run(tmp_path, {})).train()
    line, checkpoint = ends(tmp_path, DataError, KillsWorker(), workers=1)
    assert "worker" in line and checkpoint.update >= 6 and str(checkpoint.path) in line


def test_a_batch_that_is_not_a_number(tmp_path):
    data = HeldRows()
    Trainer(Fit(), data, settings(updates=12), Run(tmp_path, {})).train()
    data.x[7] = float("nan")
    line, checkpoint = ends(tmp_path, NonFiniteLossError, data, updates=40)
    assert "loss is nan at update" in line
    assert line.endswith(f"the last good checkpoint is {checkpoint.path}") and checkpoint.update >= 12
    assert all(value.isfinite().all() for value in checkpoint.state["trained"].values())


def fill_disk(pipe, path):
    """Train while no file may grow beyond 4 kB from the second checkpoint on."""
    step = Trainer._step

    def limited_step(self, batch):
        step(self, batch)
        if self.update == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    Trainer._step = limited_step
    try:
        Trainer(Fit(), HeldRows(), settings(log_every=20), Run(path, {})).train()
        pipe.send("no error")
    except CheckpointError as error:
        pipe.send(str(error))


def write_beyond(pipe, path):
    """What each file of a run says that cannot be written."""
    run, said = Run(path, {}), {}
    (path / "result").write_text("x")
    writes = {
        "metrics.jsonl": lambda: run.log({"update": 1}),
        "finished.json": lambda: run.finish(["result"]),
        "curves.png": lambda: plot_curves([{"update": 1, "loss": 1.0}], path / "curves.png"),
        "model.safetensors": lambda: save_denoiser(tiny_denoiser(), path / "model.safetensors"),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    for name, write in writes.items():
        try:
            write()
        except OSError as error:
            said[name] = str(error)
    pipe.send(said)


def test_files_that_cannot_be_written_are_named(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=write_beyond, args=(theirs, tmp_path))
    child.start()
    theirs.close()
    said = ours.recv()
    child.join(60)
    assert len(said) == 4
    for name, line in said.items():
        assert str(tmp_path / name) in line and "File too large" in line and "\n" not in line
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"config.yaml", "result", "metrics.jsonl"}  # with a line cut off


def test_a_full_disk(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=fill_disk, args=(theirs, tmp_path))
    child.start()
    theirs.close()
    line = ours.recv()
    child.join(60)
    assert "could not write the checkpoint" in line and "\n" not in line
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0000006.json", "0000006.pt"]
    checkpoint = Run(tmp_path, {}).load_checkpoint()
    assert checkpoint.update == 6 and line.endswith(f"the last good one is {checkpoint.path}")


def test_checkpoints_of_two_runs_in_one_folder(tmp_path):
    for seed in (1, 2):
        run = Run(tmp_path / str(seed), {"seed": seed, "log_every": seed})
        run.save_checkpoint(10 * seed, {"seed": seed})
    for file in (tmp_path / "2/checkpoints").iterdir():
        shutil.copy(file, tmp_path / "1/checkpoints")
    with pytest.raises(CheckpointError, match="0000020.pt was written by a run of other settings: remove"):
        Run(tmp_path / "1", {"seed": 1}).load_checkpoint()
    for file in (tmp_path / "1/checkpoints").glob("0000020*"):
        file.unlink()
    assert Run(tmp_path / "1", {"seed": 1}).load_checkpoint().update == 10


def test_accepted_changes_continue_the_run_for_good(tmp_path):
    Run(tmp_path, {"rate": 1, "accept_changes": False}).save_checkpoint(10, {})
    with pytest.raises(ValueError, match="rate was 1 and is now 2; choose another folder, or accept_changes=true"):
        Run(tmp_path, {"rate": 2, "accept_changes": False})
    Run(tmp_path, {"rate": 2, "accept_changes": True}).stage("004")
    run = Run(tmp_path, {"rate": 2})
    assert run.load_checkpoint().update == 10 and "accept_changes" not in run.config
    run.save_checkpoint(20, {})
    Run(tmp_path, {"rate": 1}, accept_changes=True)
    assert Run(tmp_path, {"rate": 1}).load_checkpoint().update == 20


def test_accepted_settings_of_the_optimiser_count(tmp_path):
    Trainer(Fit(), HeldRows(), settings(updates=6), Run(tmp_path, {})).train()
    trainer = Trainer(Fit(), HeldRows(), settings(updates=7, weight_decay=0.3, betas=(0.5, 0.6)), Run(tmp_path, {}))
    trainer.train()
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 0.3 and group["betas"] == (0.5, 0.6)
