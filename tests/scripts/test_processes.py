"""Two processes, as `torchrun` starts them, run every kind of script to the results of one."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffdistill.distributed import barrier
from diffdistill.models import save_denoiser
from diffdistill.training.run import read_metrics
from tests.builders import tiny_denoiser
from tests.scripts.calling import call
from tests.scripts.test_reproduce import TABLE
from tests.training.several import several

QUICK = ["trainer.updates=2", "trainer.batch_size=8", "trainer.device=cpu", "trainer.sample_every=null"]


def run(script, *overrides):
    """A program that ends in all processes before the next one begins, as under `torchrun`."""
    done = call(script, *overrides)
    barrier()
    return done


def scripts(folder, out):
    """Both stages, a learned solver, samples, measures and a table; what each program printed."""
    torch.set_num_threads(1)
    teacher, here = folder / "teacher.safetensors", folder / out
    # Not Adam, which makes steps of full length of gradients that are rounding noise.
    small = [*QUICK, "preview.num_samples=4", "trainer.optimizer=sgd", "trainer.learning_rate=0.03"]
    drawn = [f"model={here / 'two/stages/001'}", "num_samples=9", "batch_size=2", "device=cpu", "seed=3", "save=npz"]
    measured = [
        f"samples={here / 'x/samples.npz'}",
        "measures=[fid]",
        "splits=1",
        "features=digit_pixels",
        "device=cpu",
    ]
    table = ["table=tiny", f"hydra.searchpath=[file://{folder}]", "device=cpu", "batch_size=4"]
    return [
        run("distill_guidance", f"teacher={teacher}", f"out={here / 'one'}", *small),
        run("distill_steps", f"teacher={here / 'one'}", f"out={here / 'two'}", "start_steps=2", "stages=null", *small),
        run("train_amed", f"model={teacher}", "experiment=digits/amed_3nfe", f"out={here / 'amed'}", *QUICK[:3]),
        run("sample", *drawn, "w=1", f"out={here / 'x'}"),
        run("evaluate", *measured, f"out={here / 'found.json'}"),
        run("reproduce", *table, f"out={here / 'table'}"),
        run("sample", *drawn[:1], "num_samples=1", "device=cpu", f"out={here / 'few'}"),
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder, and the programs of one process and of two."""
    folder = tmp_path_factory.mktemp("scripts")
    save_denoiser(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), folder / "teacher.safetensors")
    (folder / "table").mkdir()
    (folder / "table/tiny.yaml").write_text(
        TABLE.format(model=folder / "teacher.safetensors", num_samples=11).replace("[2, 3, 4, 5, 6, 7]", "[2]")
    )
    threads = torch.get_num_threads()
    one = scripts(folder, "alone")
    torch.set_num_threads(threads)
    return folder, one, several(2, printed, folder)


def printed(folder):
    return [(done.returncode, done.stdout, done.stderr) for done in scripts(folder, "together")]


def test_every_program_ends_well_and_prints_once(both):
    _, one, (first, second) = both
    for alone, (code, out, errors), (other_code, other_out, _) in zip(one[:-1], first[:-1], second[:-1], strict=True):
        assert (alone.returncode, code, other_code) == (0, 0, 0), (alone.stderr, errors)
        assert out.strip() and not other_out


def test_more_processes_than_samples_is_one_line(both):
    assert both[1][-1].returncode == 0
    for place, (code, _, errors) in enumerate(answer[-1] for answer in both[2]):
        assert code == 2
        who = " in process 1" if place else ""
        assert errors.strip() == f"error{who}: num_samples=1 is less than one for each of the 2 processes"


@pytest.mark.parametrize("name", ["one/model", "two/stages/001/model"])
def test_the_results_of_training_are_those_of_one(both, name):
    alone, together = (load_file(both[0] / out / f"{name}.safetensors") for out in ("alone", "together"))
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-5)


def test_the_losses_of_a_learned_solver_are_those_of_one(both):
    alone, together = (read_metrics(both[0] / out / "amed/metrics.jsonl") for out in ("alone", "together"))
    assert [r["loss"] for r in together] == pytest.approx([r["loss"] for r in alone], rel=1e-3)


def test_samples_and_measures_are_those_of_one(both):
    alone, together = (np.load(both[0] / out / "x/samples.npz")["x"] for out in ("alone", "together"))
    np.testing.assert_allclose(together, alone, atol=1e-3)
    found = [json.loads((both[0] / out / "found.json").read_text())["measures"] for out in ("alone", "together")]
    assert found[1]["fid"]["value"] == pytest.approx(found[0]["fid"]["value"], rel=1e-2)
    cells = [json.loads((both[0] / out / "table/cells/euler__2.json").read_text()) for out in ("alone", "together")]
    assert cells[0]["nfe"] == cells[1]["nfe"] == 2
    accuracies = [cell["measures"]["accuracy"]["value"] for cell in cells]
    assert accuracies[1] == accuracies[0]
