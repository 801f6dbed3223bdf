"""The benchmark of the published networks measures every cell, on a small network of the same class."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import published_networks  # noqa: E402


def test_a_row_has_every_cell(capsys):
    given = ["sd_tiny", "--batch", "1", "--steps", "1", "--rounds", "1", "--device", "cpu", "--precision", "fp32"]
    published_networks.main(given)
    head, rule, row = (line.split("|")[1:-1] for line in capsys.readouterr().out.strip().splitlines())
    cells = dict(zip((name.strip() for name in head), (cell.strip() for cell in row), strict=True))
    assert len(rule) == len(head) == len(row) == len(published_networks.COLUMNS)
    assert all(float(cell) > 0 for cell in (c.strip() for c in row[4:]))
    assert (cells["how"], cells["pixels"], cells["torch"]) == ("fp32", "8", torch.__version__)


def test_growth_takes_several_values(capsys):
    with pytest.raises(SystemExit):
        published_networks.arguments(["digits", "--vary", "colour", "3"])
    assert "batch, steps or resolution" in capsys.readouterr().err
    options = published_networks.arguments(["digits", "--vary", "batch", "2", "4"])
    assert options.vary == ["batch", "2", "4"]
