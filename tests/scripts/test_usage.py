"""`--help` of every script: its docstring, its settings with their comments, its own presets."""

import pytest

from tests.scripts.calling import ROOT, call

SCRIPTS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_docstring_and_every_setting(script, flag):
    done = call(script, flag)
    assert done.returncode == 0 and not done.stderr
    assert f"scripts/{script}.py" in done.stdout and "Settings:" in done.stdout
    assert "hydra:" not in done.stdout and "defaults:" not in done.stdout


def test_help_shows_the_presets_of_the_script_alone():
    text = call("distill_guidance", "--help").stdout
    assert "meng2023/cifar10_stage1" in text and "stage2" not in text and "zhou2024" not in text
    assert "w: [0.0, 4.0]               # range of guidance weights" in text


def test_help_of_reproduce_needs_no_table():
    assert "table=must be given: amed_cifar10" in call("reproduce", "--help").stdout
