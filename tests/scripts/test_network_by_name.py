"""A network in a file of the working directory, by commands alone: trained, sampled, distilled to four steps."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from diffdistill.models.building import NETWORKS
from diffdistill.models.own.registration import REGISTERED
from tests.scripts.calling import call

MINE = ["plugins=[own_unet]"]
TRAINED = ["trainer.updates=2", "trainer.batch_size=8", "trainer.device=cpu", "trainer.sample_every=null"]
FAST = [*MINE, *TRAINED, "trainer.warmup=1", "trainer.precision=fp32", "data=digits_train", "experiment=none"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the network, whose module and name are forgotten afterwards."""
    shutil.copy(Path(__file__).parents[1] / "workflows/own_unet.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for table in (sys.modules, NETWORKS, REGISTERED):
        table.pop("own_unet", None)


def done(name, *arguments):
    result = call(name, *arguments)
    assert result.returncode == 0, result.stderr


def test_commands_alone_make_a_student_of_four_steps(here):
    network = ["network@model=own", "model.network.name=own_unet", "+model.network.width=8"]
    done("train_teacher", *FAST, *network, "out=teacher")
    published = ["form=amed", "predictor={name: amed}", "objective={name: stepwise, teacher: {name: heun}, points: 1}"]
    done(
        "train_amed",
        *MINE,
        *TRAINED[:3],
        *published,
        "model=teacher",
        "num_steps=2",
        "w=1",
        "experiment=none",
        "out=amed",
    )
    done("distill_guidance", *FAST, "teacher=teacher", "out=guided")
    done("distill_steps", *FAST, "teacher=guided", "start_steps=8", "last_steps=4", "out=steps")
    drawn = ["num_samples=3", "save=npz", "device=cpu", "w=1", *MINE]
    done("sample", "model=steps/stages/004", *drawn, "out=x")
    done("sample", "model=teacher", "solver=learned", "solver.predictor=amed", *drawn, "out=fast")
    for folder in ("x", "fast"):
        assert np.load(here / folder / "samples.npz")["x"].shape == (3, 1, 8, 8)

    for table in (sys.modules, NETWORKS, REGISTERED):
        table.pop("own_unet")
    result = call("sample", "model=steps/stages/004", *drawn[:-1], "out=again")
    assert result.returncode == 2
    assert "the network 'own_unet', which is not registered here" in result.stderr
    assert "plugins=[MODULE]" in result.stderr
