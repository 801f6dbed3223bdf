"""What users do wrong ends in one line and exit code 2, and leaves no file behind."""

import numpy as np
import pytest

from diffdistill.denoiser import Distilled
from diffdistill.models import guidance_student, save_denoiser
from tests.builders import tiny_denoiser
from tests.scripts.bad_input import CASES
from tests.scripts.calling import call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that stand behind the names of the table."""
    folder = tmp_path_factory.mktemp("files")
    teacher = tiny_denoiser(data_shape=[1, 8, 8], num_classes=10)
    student = guidance_student(teacher, (0.0, 4.0))
    save_denoiser(student, folder / "guided.safetensors")
    student.distilled = Distilled((80.0, 1.0, 0.0))
    save_denoiser(teacher, folder / "teacher.safetensors")
    save_denoiser(student, folder / "student.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:-100])
    (folder / "text.safetensors").write_text("some words")
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other/thesis.tex").write_text("x")
    grey, mean = np.zeros((20, 1, 2, 2), np.float32), np.zeros(4)
    mean[1] = np.nan
    np.savez(folder / "grey.npz", x=grey, y=np.arange(20) % 10)
    np.savez(folder / "bytes.npz", x=np.arange(256, dtype=np.uint8).reshape(64, 1, 2, 2))
    np.savez(folder / "nothing.npz", x=grey[:0])
    np.savez(folder / "no_x.npz", z=grey)
    np.savez(folder / "wrong.npz", mu=mean, sigma=np.eye(4))
    damaged = bytearray((folder / "grey.npz").read_bytes())
    damaged[200] ^= 255
    (folder / "damaged.npz").write_bytes(damaged)
    archives = ("grey", "bytes", "nothing", "no_x", "wrong", "damaged")
    names = ("teacher", "guided", "student", "truncated", "text")
    files = {name: folder / f"{name}.npz" for name in archives} | {n: folder / f"{n}.safetensors" for n in names}
    return {name.upper(): path for name, path in files.items()} | {
        "EMPTY": folder / "empty",
        "OTHER": folder / "other",
    }


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, files, tmp_path, monkeypatch):
    script, overrides, expected = CASES[case]
    for name, path in {**files, "OUT": tmp_path / "out"}.items():
        overrides = [o.removesuffix(f"={name}") + f"={path}" if o.endswith(f"={name}") else o for o in overrides]
    if not any(o.startswith(("out=", "dest=")) for o in overrides) and script != "reproduce":
        overrides = [*overrides, f"out={tmp_path / 'out'}"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    done = call(script, *overrides)
    errors = done.stderr.strip()
    assert done.returncode == 2, errors
    assert len(errors.splitlines()) == 1 and errors.startswith("error: "), errors
    for text in expected:
        assert text in errors
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("config.yaml", "inputs.json")]
    assert not written
