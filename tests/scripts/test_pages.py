"""What README and the pages of docs say of files, commands, names and results is what lies in the repository."""

import ast
import csv
import pkgutil
import re

import pytest

from tests.scripts.calling import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:scripts|benchmarks)/\w+\.py|(?:docs|results)/[\w/.-]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    for command in re.findall(r"(?m)^ {4}diffdistill ([a-z][\w-]*)|`diffdistill ([a-z][\w-]*)", text):
        assert (ROOT / f"scripts/{max(command).replace('-', '_')}.py").is_file(), command
    for preset in re.findall(r"experiment=(\w+/\w+)(?=[\s`])", text):
        assert (ROOT / "configs/experiment" / f"{preset}.yaml").is_file(), preset
    for table in re.findall(r"table=([a-z]\w+)", text):
        assert (ROOT / "configs/table" / f"{table}.yaml").is_file(), table
    for name in re.findall(r"(?m)(?:^::: |`)(diffdistill\.[\w.]+)", text):
        assert named(name) is not None, name


def test_every_command_is_on_its_page_as_it_speaks_of_itself():
    page = dict(re.findall(r"(?m)^\| `diffdistill ([\w-]+)` \| (.*) \|$", (ROOT / "docs/commands.md").read_text()))
    scripts = {path.stem.replace("_", "-"): path for path in (ROOT / "scripts").glob("*.py")}
    said = {name: ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0] for name, path in scripts.items()}
    assert page == said


def named(path):
    """What a dotted path names: a module, or something in one."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


@pytest.mark.parametrize("evaluations", [3, 5, 7])
def test_the_table_of_learned_solvers_is_that_of_the_results(evaluations):
    with open(ROOT / "results/compare_solvers_w0/solvers.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["nfe"]) == evaluations]
    errors = []
    for started in (False, True):
        for learned in (False, True):
            chosen = [r for r in rows if bool(r["start"]) == started and (r["parameters"] != "0") == learned]
            errors.append(f"{min(float(row['error']) for row in chosen):.3f}")
    (line,) = (line for line in README.splitlines() if re.match(rf"\| {evaluations} \| \d\.\d+ \(", line))
    assert re.findall(r"\d\.\d{3}", line) == errors
