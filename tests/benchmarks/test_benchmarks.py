"""The benchmarks of GPUs measure all that they should, on small networks of the same classes."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import one_gpu  # noqa: E402
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


def test_one_gpu_measures_all_parts_and_names_what_fails(monkeypatch, tmp_path, capsys):
    tiny = "sd_tiny --batch 1 --steps 1 --rounds 1 --precision fp32 --only sampling"
    changes = {"PLAIN": tiny, "SAMPLING": (tiny,), "ROWS": (tiny, f"{tiny} --cuda-graph", tiny)}
    changes |= {"SAMPLES": 70, "STEPS": 1, "AMED_NETWORK": "digits", "TRAJECTORIES": 1}
    changes |= {"gpu_tests": lambda device: iter(["GPU tests: 14 passed"])}
    for name, value in changes.items():
        monkeypatch.setattr(one_gpu, name, value)
    one_gpu.main(["--device", "cpu", "--out", str(tmp_path / "session.md")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "session.md").read_text().splitlines()
    starts = (
        "| sd_tiny",
        "images/s of",
        "Frechet distance of 70 digits",
        "  plugin ipndm",
        "GPU tests",
        "part 6 failed",
    )
    counts = [sum(line.startswith(start) for line in lines) for start in starts]
    assert counts == [4, 1, 1, 3, 1, 1]
    one_gpu.main(["--device", "cpu", "--out", str(tmp_path / "none.md"), "--minutes", "-1"])
    assert capsys.readouterr().out == "0.0 minutes: parts 1 to 7 were not begun\n"
