"""What a user types is what happens: no preset overrides it, and what a command does not read is refused."""

import copy

import pytest

from tests.scripts.calling import ROOT, call

from common.checks import check_settings, mappings  # isort: skip
from common.configs import compose, plain  # isort: skip

GIVEN = {
    "reproduce": ["table=digits_solvers"],
    "cache_latents": ["model=digits-teacher", "data=shapes", "out=x"],
    "convert": ["source=x.pkl", "dest=y.safetensors"],
    "export": ["model=digits-student-4", "teacher=x", "out=x"],
    "make_reference": ["features=pixels", "out=x"],
    "sample": ["solver=dpmpp", "schedule=polynomial", "start={sigma: 3, statistics: digits-teacher}"],
    "evaluate": ["solver=dpmpp", "schedule=logsnr"],
    "distill_guidance": [
        "noise_levels=on_schedule",
        "noise_levels.schedule={name: cosine, num_steps: 8}",
        "lora={rank: 2}",
    ],
}
"""What each script needs, and groups of settings that it has only when asked for."""
SCRIPTS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
CONFIGS = {script: plain(compose(script, GIVEN.get(script, []))) for script in SCRIPTS}
PLACES = [(s, ".".join(path)) for s in SCRIPTS for path in [(), *(path for path, _ in mappings(CONFIGS[s]))]]


def refusal(script, place, name):
    """What is said to a setting `name=1` in a group: at the door, or by the whole command where its reader refuses."""
    settings = copy.deepcopy(CONFIGS[script])
    group = settings
    for step in filter(None, place.split(".")):
        group = group[int(step) if isinstance(group, list) else step]
    group[name] = 1
    try:
        check_settings(settings, script)
    except ValueError as error:
        return str(error)
    done = call(script, *GIVEN.get(script, []), f"+{place}.{name}=1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (done.stdout, done.stderr)
    return done.stderr


@pytest.mark.parametrize(("script", "place"), PLACES)
def test_an_unknown_setting_is_refused_at_every_depth(script, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "zzz_nothing" in refusal(script, place, "zzz_nothing")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_settings_of_every_preset_are_known():
    for script in SCRIPTS:
        check_settings(CONFIGS[script], script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_refuses_before_it_writes(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(script, *GIVEN.get(script, []), "zzz_nothing=1")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown setting 'zzz_nothing': ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_trainer_of_the_user_wins_over_the_stages_of_a_preset():
    stages = compose("distill_steps", ["start_steps=8", "trainer.updates=12"]).stages
    assert not any("updates" in stage for stage in stages.values())
    given = ["trainer.updates=12", "++stages.2.updates=30", "++stages.4.learning_rate=1e-4"]
    stages = compose("distill_steps", given).stages
    assert plain(stages)["2"] == {"updates": 30} and plain(stages)["4"] == {"learning_rate": 1e-4}
    assert plain(compose("distill_steps", [])).get("stages")["4"] == {"updates": 1200}
    laion = compose("distill_steps", ["experiment=meng2023/laion512_text_stage2", "trainer={updates: 7}"])
    assert plain(laion.stages) == {"4": {}, "2": {}, "1": {}}


@pytest.mark.parametrize(
    ("script", "given", "meant"),
    [
        ("sample", "guidance_scale=7.5", "(did you mean w, which is guidance_scale - 1?)"),
        ("sample", "+guidance_scale=7.5", "(did you mean w, which is guidance_scale - 1?)"),
        ("edit", "guidance=2", "(did you mean w?)"),
        ("sample", "num_inference_steps=4", "(did you mean num_steps?)"),
        ("sample", "num_smaples=3", "(did you mean num_samples?)"),
        ("train_teacher", "updates=3", "(did you mean trainer.updates?)"),
        ("train_teacher", "lr=3", "(did you mean trainer.learning_rate?)"),
        ("train_teacher", "trainer.lr=1", "(did you mean trainer.learning_rate?)"),
        ("distill_steps", "stages.4.updatse=3", "(did you mean stages.4.updates?)"),
        ("compare_solvers", "reference.num_step=3", "(did you mean reference.num_steps?)"),
        ("sample", "solvr=heun", "(did you mean solver?)"),
    ],
)
def test_the_nearest_valid_name_is_named(script, given, meant, tmp_path):
    done = call(script, f"out={tmp_path / 'x'}", given)
    assert done.returncode == 2 and meant in done.stderr, done.stderr


def test_an_option_that_a_preset_does_not_state_is_given_like_any_other(tmp_path):
    done = call(
        "sample", "solver=dpmpp", "solver.order=7", f"out={tmp_path / 'x'}", "model=digits-teacher", "num_steps=2"
    )
    assert done.returncode == 2 and "order must be" in done.stderr, done.stderr
    done = call("train_teacher", "data.flip=true", f"out={tmp_path / 'x'}")
    assert done.returncode == 2 and "unknown setting 'data.flip'" in done.stderr  # digits are not mirrored
