"""`diffdistill` and `python -m diffdistill`: the same programs as the scripts, under the name that was typed."""

import ast
import sys
from unittest import mock

import pytest

from diffdistill.__main__ import commands, main, scripts_folder
from diffdistill.models.storage import MODEL
from tests.scripts.calling import ROOT


def run(capsys, *arguments, program="/somewhere/bin/diffdistill"):
    """Exit code, stdout and stderr of `diffdistill ARGUMENTS`."""
    with mock.patch.object(sys, "argv", [program, *map(str, arguments)]), mock.patch.object(sys, "path", [*sys.path]):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("given", [[], ["--help"], ["-h"], ["help"]])
def test_alone_it_lists_every_script_with_a_line(given, capsys):
    code, out, _ = run(capsys, *given)
    assert code == 0
    for path in (ROOT / "scripts").glob("*.py"):
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [path.stem.replace("_", "-")])
        assert line.endswith(ast.get_docstring(ast.parse(path.read_text())).splitlines()[0])


def test_every_script_has_settings_of_its_name():
    assert {path.stem for path in commands(scripts_folder()).values()} == {
        p.stem for p in (ROOT / "configs").glob("*.yaml")
    }


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys):
    code, out, errors = run(capsys, "distil-steps", "w=1")
    assert code == 2 and not out
    assert errors.startswith("error: unknown command 'distil-steps' (did you mean distill-steps?): choose one of ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("name", ["distill-steps", "distill_steps"])
def test_help_names_the_command_that_was_typed(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "    diffdistill distill-steps experiment=digits/stage2" in out and "scripts/" not in out
    _, out, _ = run(capsys, name, "--help", program="/checkout/src/diffdistill/__main__.py")
    assert "    python -m diffdistill distill-steps experiment=digits/stage2" in out


def test_provenance_names_the_command_that_was_typed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["trainer.updates=1", "trainer.batch_size=2", "trainer.device=cpu", "trainer.sample_every=null"]
    code, out, errors = run(capsys, "train-teacher", "model.network.model_channels=8", *small, "out=t")
    assert code == 0, errors
    assert "the teacher is t/model.safetensors" in out
    config, _ = MODEL.read(tmp_path / "t/model.safetensors")
    given = " ".join(["model.network.model_channels=8", *small, "out=t"])
    assert config["provenance"]["command"] == f"diffdistill train-teacher {given}"
