import json
from types import SimpleNamespace

import pytest
import torch

from diffdistill.training import CheckpointError, Run

CONFIG = {"seed": 1, "trainer": {"updates": 10, "log_every": 5, "betas": (0.9, 0.99)}}


def with_trainer(**changes):
    return {**CONFIG, "trainer": {**CONFIG["trainer"], **changes}}


def saved(path, updates=(10, 20, 30), keep=2):
    run = Run(path, CONFIG)
    for update in updates:
        run.save_checkpoint(update, {"w": torch.full((100,), float(update))}, keep=keep)
    return run


def test_the_last_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path):
    run = saved(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "0000020.json",
        "0000020.pt",
        "0000030.json",
        "0000030.pt",
    ]
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None and checkpoint.update == 30
    assert checkpoint.state["w"].tolist() == [30.0] * 100


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def garble_manifest(path):
    path.with_suffix(".json").write_text('{"update": 30, "by')


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble_manifest, lambda path: path.unlink()])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, damage, caplog):
    run = saved(tmp_path)
    damage(tmp_path / "checkpoints" / "0000030.pt")
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None and checkpoint.update == 20
    assert "0000030.pt" in caplog.text and "going back" in caplog.text
    run.save_checkpoint(25, {"w": torch.zeros(1)}, keep=1)
    again = run.load_checkpoint()
    assert again is not None and again.update == 25


def test_without_any_readable_checkpoint_the_run_does_not_start_again_by_itself(tmp_path):
    run = saved(tmp_path, updates=[10])
    truncate(tmp_path / "checkpoints" / "0000010.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        run.load_checkpoint()


def test_a_checkpoint_half_written_when_the_process_died_does_not_count(tmp_path):
    run = saved(tmp_path, updates=[10])
    (tmp_path / "checkpoints" / ".0000020.77.tmp.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "0000020.pt").write_bytes(b"whole, but its record is missing")
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None and checkpoint.update == 10
    run.save_checkpoint(30, {}, keep=2)
    assert {p.name.split(".")[0] for p in (tmp_path / "checkpoints").iterdir()} == {"0000010", "0000030"}


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    run = Run(tmp_path, CONFIG)
    run.save_checkpoint(10, {"w": Bomb()})
    with pytest.raises(CheckpointError):
        run.load_checkpoint()


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = saved(tmp_path, updates=[10])

    def full(state, path):
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device.*last good one is .*0000010.pt") as caught:
        run.save_checkpoint(20, {})
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0000010.json", "0000010.pt"]


def test_a_disk_that_torch_finds_full_is_named(tmp_path, monkeypatch):
    run = saved(tmp_path, updates=[10])

    def fails(state, path):
        path.write_bytes(b"some of it")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointError, match="unexpected pos"):
        run.save_checkpoint(20, {})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(CheckpointError, match="0000020.pt .*No space left on device.: the last good one is"):
        run.save_checkpoint(20, {})


def test_changes_of_a_finished_run_come_too_late(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.stage("004").finish()
    Run(tmp_path, with_trainer(updates=20), accept_changes=True).stage("004")
    run.finish()
    with pytest.raises(ValueError, match="it is finished, so choose another folder"):
        Run(tmp_path, CONFIG, accept_changes=True)
    Run(tmp_path, with_trainer(updates=20, log_every=1), accept_changes=True)


def test_a_folder_of_another_run_is_refused_and_the_difference_shown(tmp_path):
    Run(tmp_path, CONFIG).log({"update": 1})
    with pytest.raises(
        ValueError, match="holds another run: seed was 1 and is now 2, trainer.updates was 10 and is now 5"
    ):
        Run(tmp_path, {**with_trainer(updates=5), "seed": 2})
    with pytest.raises(ValueError, match="trainer.clip was None and is now 1.0"):
        Run(tmp_path, with_trainer(clip=1.0))
    Run(tmp_path, CONFIG)  # the refusals changed nothing
    Run(tmp_path, with_trainer(log_every=7))
    assert Run(tmp_path, with_trainer(updates=20), accept_changes=True).config["trainer"]["updates"] == 20


def test_a_command_that_failed_at_once_leaves_the_folder_to_the_next(tmp_path):
    Run(tmp_path, CONFIG)
    assert Run(tmp_path, {**CONFIG, "seed": 2}).config["seed"] == 2
    assert not (tmp_path / "accepted.json").exists() and "seed: 2" in (tmp_path / "config.yaml").read_text()


def test_numbers_survive_the_config_file(tmp_path):
    config = {"a": 1e-5, "b": 0.1 + 0.2, "c": "1e-3", "d": None, "e": [1, 2.5], "f": {"g": True, "h": "null"}}
    Run(tmp_path, config)
    Run(tmp_path, config)


def test_a_folder_with_other_files_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds no run but other files .thesis.tex."):
        Run(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        Run(tmp_path / "thesis.tex", CONFIG)


def test_metrics_are_rewound_and_a_line_cut_off_is_dropped(tmp_path):
    run = Run(tmp_path, CONFIG)
    for update in (5, 10, 15):
        run.log({"update": update, "loss": 1 / update})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"update": 20, "lo')
    run.rewind(10)
    assert [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 10]


def test_stages_are_runs_of_their_own_that_remember_that_they_finished(tmp_path):
    run = Run(tmp_path, CONFIG)
    done = []
    for _ in range(2):
        for name in ("008", "004"):
            stage = run.stage(name)
            if stage.finished:
                continue
            done.append(name)
            stage.save_checkpoint(1, {})
            (stage.path / "student.bin").write_bytes(name.encode())
            stage.finish(["student.bin"])
            assert not list((stage.path / "checkpoints").iterdir())
    assert done == ["008", "004"]
    (run.stage("004").path / "student.bin").write_bytes(b"")
    assert run.stage("008").finished and not run.stage("004").finished
    with pytest.raises(ValueError, match="without folders"):
        run.stage("../004")
    with pytest.raises(ValueError, match="stage was '008' and is now '004'"):
        Run(run.stage("008").path, {**CONFIG, "stage": "004"})
