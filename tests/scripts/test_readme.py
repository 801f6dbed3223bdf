"""What README says of files and of results is what lies in the repository."""

import csv
import re

import pytest

from tests.scripts.calling import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_and_presets_exist():
    for path in re.findall(r"\b(?:scripts|benchmarks)/\w+\.py|(?:docs|results)/[\w/.-]+\.\w+", README):
        assert (ROOT / path).is_file(), path
    for preset in re.findall(r"experiment=(\w+/\w+)(?=[\s`])", README):
        assert (ROOT / "configs/experiment" / f"{preset}.yaml").is_file(), preset
    for table in re.findall(r"table=(\w+)", README):
        assert (ROOT / "configs/table" / f"{table}.yaml").is_file(), table


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
