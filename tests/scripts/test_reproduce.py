"""Evaluation from the command line: a table that is killed and continued, references, measures, and mistakes."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from diffdistill.data import load_data
from diffdistill.models import save_denoiser
from tests.builders import tiny_denoiser
from tests.scripts.calling import ROOT, call, command

TABLE = """
title: Tiny
column: nfe
columns: [2, 3, 4, 5, 6, 7]
model: {model}
schedule: {{name: polynomial}}
reference: {{data: {{name: digits, split: test}}}}
features: digits_classifier
measures: [accuracy]
num_samples: {num_samples}
rows:
  - {{name: Euler, solver: {{name: euler}}}}
  - {{name: iPNDM, solver: {{name: ipndm}}}}
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder for Hydra's search path with two tables: `tiny`, and `absent`, whose model is not there."""
    folder = tmp_path_factory.mktemp("configs")
    save_denoiser(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), folder / "model.safetensors")
    (folder / "table").mkdir()
    (folder / "table/tiny.yaml").write_text(TABLE.format(model=folder / "model.safetensors", num_samples=1500))
    (folder / "table/absent.yaml").write_text(TABLE.format(model="checkpoints/nowhere.pkl", num_samples=10))
    return folder


def contents(folder):
    """What is written: files that are being written have names with a dot in front."""
    paths = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
    return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in paths}


def test_a_killed_table_continues_without_repeating_finished_cells(tables, tmp_path):
    given = ["reproduce", "table=tiny", f"out={tmp_path}", f"hydra.searchpath=[file://{tables}]", "batch_size=500"]
    process = subprocess.Popen(command(*given), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(contents(tmp_path / "cells")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = contents(tmp_path / "cells")
    assert 2 <= len(finished) < 12 and not (tmp_path / "index.html").exists()
    done = call(*given)
    assert done.returncode == 0, done.stderr
    everything = contents(tmp_path / "cells")
    assert len(everything) == 12 and {name: everything[name] for name in finished} == finished
    assert "12 of 12 cells are measured" in done.stdout
    assert {path.name for path in tmp_path.glob("*.*")} == {
        "files.json",
        "index.html",
        "plot.png",
        "samples.png",
        "table.csv",
        "table.md",
    }
    assert json.loads(everything["ipndm__7.json"][1])["nfe"] == 7


def test_mistakes_with_tables_are_one_line(tables, tmp_path):
    done = call("reproduce", "table=tinny", f"hydra.searchpath=[file://{tables}]")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "tinny" in done.stderr and "digits_students" in done.stderr
    done = call("reproduce", "table=absent", f"hydra.searchpath=[file://{tables}]", f"out={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: nothing could be measured. Missing: checkpoints/nowhere.pkl" in done.stderr
    assert "0 of 12 cells" in (tmp_path / "table.md").read_text()


def test_a_dry_run_of_a_papers_table_names_what_it_needs():
    done = call("reproduce", "table=amed_cifar10", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz" in done.stdout
    assert "diffdistill train-amed experiment=zhou2024/amed_cifar10 num_steps=2" in done.stdout
    assert f"{50000 * 7 * (3 + 5 + 7 + 9):,} network evaluations to do" in done.stdout


def test_references_and_measures_from_the_command_line(tables, tmp_path):
    reference = tmp_path / "digits.npz"
    done = call("make_reference", "data=digits", "features=digits_classifier", "keep_features=true", f"out={reference}")
    assert done.returncode == 0, done.stderr
    assert "1797 images, digits_classifier" in done.stdout
    digits = load_data("digits")
    np.savez(tmp_path / "samples.npz", x=digits.x.numpy(), y=digits.y.numpy())
    options = [f"reference={reference}", "measures=[fid,recall,accuracy]", f"out={tmp_path / 'found.json'}"]
    done = call("evaluate", f"samples={tmp_path / 'samples.npz'}", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_samples"] == 1797 and found["measures"]["fid"]["value"] < 1e-9
    assert found["measures"]["recall"]["value"] == 1 and found["measures"]["accuracy"]["value"] > 0.99
    assert len(found["weights"]) == 16 and found["measures"]["fid"]["part_std"] > 0
    # Samples that are drawn on the way have the measures of those that were stored.
    model = ["model=" + str(tables / "model.safetensors"), "num_steps=2", "num_samples=100"]
    assert call("sample", *model, f"out={tmp_path / 'drawn'}", "save=npz").returncode == 0
    values = []
    for source in (model, [f"samples={tmp_path / 'drawn' / 'samples.npz'}"]):
        done = call("evaluate", *source, *options, "splits=1")
        assert done.returncode == 0 and "100 samples" in done.stdout, done.stderr
        values.append(json.loads((tmp_path / "found.json").read_text())["measures"])
    assert values[0]["fid"]["value"] == pytest.approx(values[1]["fid"]["value"], rel=1e-4)
    assert values[0]["accuracy"] == values[1]["accuracy"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give either samples=PATH"),
        (["samples=absent.npz"], "no images at 'absent.npz'"),
    ],
)
def test_mistakes_with_measures_are_one_line(overrides, message):
    done = call("evaluate", *overrides)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
