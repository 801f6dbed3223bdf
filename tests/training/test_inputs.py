"""What files hold decides whether a run is the same, and where they lie does not."""

import json
import os
import shutil

import pytest

from diffdistill.files.contents import SMALL, content_of, files_within
from diffdistill.models import save_denoiser
from diffdistill.training import Run
from diffdistill.training.inputs import inputs_of, model_files
from tests.builders import tiny_denoiser


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data" / "a"
    place.mkdir(parents=True)
    for i in range(3):
        (place / f"{i}.png").write_bytes(bytes([i]) * 5)
    return tmp_path / "data"


def digest(folder):
    return content_of(files_within(folder)).digest


def test_a_content_is_that_of_names_and_bytes_wherever_they_lie(folder, tmp_path):
    first = digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(tmp_path / "copy") == first
    for junk in (".ipynb_checkpoints/0.png", "__MACOSX/._0.png", "a/._0.png", "a/Thumbs.db", ".DS_Store"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    assert digest(folder) == first
    (folder / "a/1.png").write_bytes(b"other")
    assert digest(folder) != first
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    (folder / "a/1.png").rename(folder / "a/7.png")
    assert digest(folder) != first


def test_a_file_by_itself_may_have_any_name(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (content_of([tmp_path / name]).digest for name in "abc")
    assert a == b != c


def test_much_to_read_is_read_again_only_where_a_size_or_a_time_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(SMALL + 1)
    assert content_of([path]).stamp is None  # written a moment ago, and perhaps again before its time shows it
    monkeypatch.setattr("diffdistill.files.contents.SETTLED_SECONDS", -1.0)
    known = content_of([path])
    with monkeypatch.context() as patch:
        patch.setattr("diffdistill.files.contents.sha256", lambda path: pytest.fail("read again"))
        assert content_of([path], known) is known
    with open(path, "r+b") as file:
        file.write(b"1")
    os.utime(path, ns=(1, 1))
    assert content_of([path], known).digest != known.digest


CONFIG = {"teacher": "x", "data": {"root": "y"}, "trainer": {"updates": 10, "decay": "constant"}}


def opened(run, path, root=None, accept_changes=False, **changes):
    config = {**CONFIG, "teacher": str(path), **changes, "accept_changes": accept_changes}
    inputs = {"teacher": [path]} if path.exists() else {}
    if root is not None:
        config["data"] = {"root": str(root)}
        inputs["data.root"] = files_within(root)
    return Run(run, config, inputs=inputs)


def test_a_run_is_refused_to_files_that_hold_something_else(folder, tmp_path):
    teacher, run = tmp_path / "teacher.bin", tmp_path / "run"
    teacher.write_bytes(b"one")
    first = opened(run, teacher, folder)
    first.save_checkpoint(5, {})
    digest = first.digest
    shutil.move(teacher, tmp_path / "moved.bin")
    shutil.move(folder, tmp_path / "elsewhere")
    teacher, folder = tmp_path / "moved.bin", tmp_path / "elsewhere"
    again = opened(run, teacher, folder)
    assert again.digest == digest and again.load_checkpoint().update == 5
    teacher.write_bytes(b"two")
    with pytest.raises(
        ValueError, match="what teacher=.*moved.bin holds has changed; choose another folder, or accept"
    ):
        opened(run, teacher, folder)
    teacher.write_bytes(b"one")
    (folder / "a/1.png").write_bytes(b"edited")
    with pytest.raises(ValueError, match="what data.root=.*elsewhere holds has changed"):
        opened(run, teacher, folder)
    accepted = opened(run, teacher, folder, accept_changes=True)
    assert accepted.digest != digest and accepted.load_checkpoint().update == 5


def test_a_finished_run_is_not_that_of_another_teacher_and_stays_after_its_data_are_gone(folder, tmp_path):
    teacher, run = tmp_path / "teacher.bin", tmp_path / "run"
    teacher.write_bytes(b"one")
    opened(run, teacher, folder).finish()
    shutil.rmtree(folder)
    assert Run(run, {**CONFIG, "teacher": str(teacher), "data": {"root": str(folder)}}).finished
    teacher.write_bytes(b"two")
    for accept in (False, True):  # nothing that is advised is refused the next time
        with pytest.raises(ValueError, match="teacher=.* has changed; it is finished, so choose another folder"):
            opened(run, teacher, accept_changes=accept)


def test_a_run_of_before_contents_were_noted_goes_on(tmp_path):
    teacher = tmp_path / "teacher.bin"
    teacher.write_bytes(b"one")
    config = {**CONFIG, "teacher": str(teacher)}
    Run(tmp_path / "run", config).save_checkpoint(5, {})
    run = opened(tmp_path / "run", teacher)
    assert run.load_checkpoint().update == 5 and json.loads((tmp_path / "run/inputs.json").read_text())


def test_more_updates_extend_a_run_also_a_finished_one(tmp_path, caplog):
    longer = {"trainer": {"updates": 20, "decay": "constant"}}
    run = Run(tmp_path / "run", CONFIG)
    run.save_checkpoint(10, {})
    run.finish(keep=1)
    longer_run = Run(tmp_path / "run", {**CONFIG, **longer})
    assert not longer_run.finished and longer_run.load_checkpoint().update == 10 and not caplog.records
    with pytest.raises(ValueError, match="trainer.updates was 20 and is now 10"):
        Run(tmp_path / "run", CONFIG)
    longer["trainer"] = {"updates": 30, "decay": "cosine"}
    with pytest.raises(ValueError, match="trainer.decay was 'constant'"):
        Run(tmp_path / "run", {**CONFIG, **longer})
    longer_run.finish()
    with pytest.raises(ValueError, match=r"whose last checkpoint is gone.*init=PATH"):
        Run(tmp_path / "run", {**CONFIG, "trainer": {"updates": 30, "decay": "constant"}})


def test_a_decay_that_is_extended_is_said_and_stages_are_not_extended(tmp_path, caplog):
    config, longer = ({"trainer": {"updates": n, "decay": "linear"}} for n in (10, 20))
    Run(tmp_path / "run", config).save_checkpoint(5, {})
    Run(tmp_path / "run", longer)
    assert "decay=linear" in caplog.text
    Run(tmp_path / "staged", config).stage("004").log({"update": 1})
    with pytest.raises(ValueError, match="updates was 10 and is now 20"):
        Run(tmp_path / "staged", longer)


def test_settings_stand_for_files_at_any_depth(folder, tmp_path):
    save_denoiser(tiny_denoiser(), tmp_path / "model")
    (tmp_path / "model" / "metrics.jsonl").write_text("{}")
    model = [tmp_path / "model" / "model.safetensors"]
    assert model_files(str(tmp_path / "model")) == model_files(str(model[0])) == model
    assert model_files("digits-teacher")[0].name == "digits-teacher.safetensors" and model_files("nope") == []
    settings = {
        "model": {"network": {"name": "song_unet"}},
        "teacher": str(tmp_path / "model"),
        "data": {"name": "images", "root": str(folder)},
        "solver": {"name": "learned", "predictor": "digits-steps-3nfe"},
        "start": {"sigma": 3.5, "statistics": "digits-teacher"},
        "learned": ["digits-steps-3nfe", "digits-steps-5nfe"],
        "captions": None,
        "out": str(folder),
    }
    found = inputs_of(settings)
    (folder / "notes.txt").write_text("what is no picture is not read, and does not matter")
    assert inputs_of(settings) == found
    assert list(found) == ["teacher", "data.root", "solver.predictor", "start.statistics", "learned"]
    assert found["teacher"] == model and len(found["data.root"]) == 3 and len(found["learned"]) == 2
    assert found["start.statistics"][0].parent.name == "statistics"
