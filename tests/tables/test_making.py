"""A table from nothing: what is missing is fetched and made, in order, and what fails is named."""

import sys
from pathlib import Path

import pytest
import torch

from diffdistill.files.remote import consent
from diffdistill.models import save_denoiser
from diffdistill.tables.making import command_line, make_missing
from diffdistill.tables.planning import dry_run, work_for
from diffdistill.tables.reproduction import reproduce
from diffdistill.tables.tables import Table
from tests.builders import tiny_denoiser
from tests.files.server import Host, serve

CPU = torch.device("cpu")


def table(url, **changes):
    rows = [
        {"name": "Euler", "solver": {"name": "euler"}},
        {"name": "Lost", "model": "lost.safetensors"},
        {"name": "Asked for", "model": "asked.pkl", "get": "write to its authors"},
    ]
    settings = {
        "title": "From nothing",
        "column": "nfe",
        "columns": [2, 3],
        "model": "model.safetensors",
        "files": {
            "model.safetensors": {"url": f"{url}/model.safetensors"},
            "lost.safetensors": {"url": f"{url}/lost.safetensors"},
        },
        "schedule": {"name": "polynomial"},
        "reference": {"data": {"name": "digits", "split": "test"}},
        "features": "digits_classifier",
        "measures": ["accuracy"],
        "num_samples": 20,
        "rows": rows,
    }
    return Table.from_dict("tiny", {**settings, **changes})


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_denoiser(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), tmp_path / "source.safetensors")
    host = Host(files={"/model.safetensors": (tmp_path / "source.safetensors").read_bytes()})
    server = serve(host)
    yield host
    server.shutdown()
    server.server_close()


def test_what_is_missing_is_fetched_and_the_rest_is_named(host, tmp_path):
    made = table(host.url)
    assert [work.kind for work in work_for(made)] == ["fetch", "fetch", "by hand"]
    plan = dry_run(made, tmp_path / "out", device=CPU)
    assert f"fetch: model.safetensors: {host.url}/model.safetensors" in plan
    with consent():
        failures = make_missing(made)
    assert [failure.what for failure in failures] == ["lost.safetensors", "asked.pkl"]
    assert "no such file" in failures[0].why and failures[1].why == "write to its authors"
    assert (tmp_path / "model.safetensors").read_bytes() == host.files["/model.safetensors"]
    seen = []
    outcome = reproduce(made, tmp_path / "out", device=CPU, so_far=lambda outcome: seen.append(len(outcome.results)))
    assert seen == [1, 2] and sorted(outcome.results) == ["euler__2", "euler__3"] and outcome.failures == ()
    asked = len(host.asked)
    with consent():
        make_missing(made)
    assert not any(path == "/model.safetensors" for _, path, _ in host.asked[asked:])


def test_without_consent_nothing_is_fetched(host):
    failures = make_missing(table(host.url))
    assert "agree by fetch=true" in failures[0].why


def test_commands_are_run_and_what_they_say_is_the_reason(host):
    stats = "runs/stats/statistics.safetensors"
    rows = [
        {"name": "Euler", "solver": {"name": "euler"}},
        {
            "name": "Made",
            "model": stats,
            "get": "diffdistill gaussian-stats model=model.safetensors out=runs/stats data=digits",
        },
        {"name": "Wrong", "model": "runs/x.safetensors", "get": "diffdistill convert nothing.pkl runs/x.safetensors"},
    ]
    made = table(host.url, rows=rows)
    assert [work.kind for work in work_for(made)] == ["fetch", "make", "make"]
    with consent():
        failures = make_missing(made)
    assert Path(stats).is_file()
    assert [failure.what for failure in failures] == ["runs/x.safetensors"]
    assert failures[0].why.startswith("error: ") and "nothing.pkl" in failures[0].why


def test_no_shell_reads_a_command():
    assert command_line("diffdistill sample 'model=a b' $HOME;ls") == [
        *(sys.executable, "-m", "diffdistill", "sample", "model=a b", "$HOME;ls")
    ]


def test_a_cell_that_fails_does_not_stop_the_others(host, tmp_path):
    made = table(
        host.url, rows=[{"name": "Euler", "solver": {"name": "euler"}}, {"name": "Damaged", "model": "bad.safetensors"}]
    )
    (tmp_path / "model.safetensors").write_bytes(host.files["/model.safetensors"])
    (tmp_path / "bad.safetensors").write_bytes(b"no model" * 100)
    outcome = reproduce(made, tmp_path / "out", device=CPU)
    assert sorted(outcome.results) == ["euler__2", "euler__3"]
    assert [failure.what for failure in outcome.failures] == ["Damaged, nfe 2", "Damaged, nfe 3"]
    assert "not a whole safetensors file" in outcome.failures[0].why
