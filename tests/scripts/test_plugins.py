"""`plugins=[my.module]` imports what the user names, from the working directory too, and shows what fails there."""

import sys

import pytest

from tests.scripts.calling import call

OWN = """
from diffdistill.solvers import SOLVERS, Euler


class Longer(Euler):
    pass


SOLVERS["{name}"] = Longer
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, whose modules and registered solvers are forgotten afterwards."""
    from diffdistill.solvers import SOLVERS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("diffdistill.solvers.SOLVERS", dict(SOLVERS))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


SAMPLE = ["model=digits-teacher", "num_steps=1", "num_samples=2", "save=npz", "device=cpu", "out=x"]


def test_a_module_of_the_working_directory_registers_what_the_command_uses(here):
    (here / "my").mkdir()
    (here / "my/solver.py").write_text(OWN.format(name="longer"))
    done = call("sample", *SAMPLE, "solver=ddim", "solver.name=longer")
    assert done.returncode == 2 and "unknown solver 'longer'" in done.stderr
    done = call("sample", *SAMPLE, "solver=ddim", "solver.name=longer", "plugins=[my.solver]")
    assert done.returncode == 0, done.stderr
    # A run that continues may name others.
    assert call("sample", *SAMPLE, "solver=ddim", "solver.name=longer", "plugins=[my, my.solver]").returncode == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1 / 0", "plugins: faulty cannot be imported: ZeroDivisionError: division by zero (faulty.py, line 1)"),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it' (faulty.py, line 1)"),
        ("def f(:", "plugins: faulty cannot be imported: SyntaxError: invalid syntax (faulty.py, line 1)"),
        ("raise SystemExit(3)", "plugins: faulty cannot be imported: SystemExit: 3 (faulty.py, line 1)"),
    ],
)
def test_what_fails_in_a_plugin_is_shown_in_one_line(text, said, here):
    (here / "faulty.py").write_text(text)
    done = call("sample", *SAMPLE, "plugins=[faulty]")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: plugins: ")
    assert said in done.stderr
    assert not (here / "x").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[nowhere]", "there is no module 'nowhere' in "),
        ("[nowhere.at.all]", "there is no module 'nowhere.at.all' in "),
        ("my.module", "plugins must be a list of modules, such as plugins=[my.module], but is 'my.module'"),
        ("[my/module.py]", "'my/module.py' is no name of a module"),
        ("[sample]", "the name 'sample' is that of a command"),
        ("[3]", "plugins must be a list of modules"),
    ],
)
def test_what_is_no_plugin_is_refused(given, said, here):
    done = call("sample", *SAMPLE, f"plugins={given}")
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_preset_of_the_users_names_plugins(here):
    (here / "presets/solver").mkdir(parents=True)
    (here / "presets/solver/mine.yaml").write_text("# @package _global_\nplugins: [mine]\nsolver: {name: mine}\n")
    (here / "mine.py").write_text(OWN.format(name="mine"))
    done = call("sample", *SAMPLE, "--config-dir", "presets", "solver=mine")
    assert done.returncode == 0, done.stderr
