"""Every notebook runs from top to bottom, as a program of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CHECKS = {
    "solvers_in_ten_lines": "assert with_start < errors['unipc 3'][10] / 2",
    "the_plane_of_trajectories": "assert shape.explained.mean(0)[1] > 0.99",
    "adding_a_solver": "assert abs(order - 2) < 0.15",
    "training_a_predictor": "assert after < 0.85 * before",
    "your_own_ddpm_in_thirty_lines": "student, plain = error.values()\nassert student < 0.5 * plain",
}
"""What each notebook must show at its end."""


def test_the_notebooks_are_these():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "clear the outputs"
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-c", f"{program}\n{CHECKS[path.stem]}\n"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
