"""Every preset is composed, built small and trained for two updates; every solver and schedule config builds."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from diffdistill.denoiser import Distilled
from diffdistill.models import guidance_student, save_denoiser
from diffdistill.solvers import make_schedule, make_solver
from diffdistill.solvers.discrete_time import linear_table
from tests.builders import tiny_denoiser

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import distill_guidance  # noqa: E402
import distill_steps  # noqa: E402
import train_autoencoder  # noqa: E402
import train_teacher  # noqa: E402
from common.checks import check_settings  # noqa: E402
from common.configs import compose, plain  # noqa: E402
from common.usage import PRESETS  # noqa: E402

SMALL = {"updates": 2, "batch_size": 8, "accumulation": 2, "sample_every": None, "log_every": 1, "precision": "fp32"}


def names(group):
    folder = ROOT / "configs" / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def of_kind(kind):
    """The presets of pixel models; those of text are run in tests/interop/diffusers."""
    return [name for name in names("experiment") if name.endswith(kind) and "_text_" not in name]


def small(config, out, resolution, channels=3):
    """The same config on a few small images, for two updates."""
    data = {"name": "shapes", "resolution": resolution, "size": 16} if channels == 3 else {"name": "digits"}
    config = OmegaConf.merge(config, {"out": str(out), "trainer": SMALL, "preview": {"num_samples": 2}})
    OmegaConf.update(config, "data", data, merge=False)
    if "network" in config.get("model", {}):
        blocks = {"model_channels": 8, "num_blocks": 1, "channel_mult": [1, 2], "attn_resolutions": [4]}
        config = OmegaConf.merge(config, {"model": {"network": blocks}})
    return config


@pytest.mark.parametrize("experiment", of_kind("teacher"))
def test_teacher_presets(experiment, tmp_path):
    channels = 1 if experiment.startswith("digits") else 3
    config = compose("train_teacher", [f"experiment={experiment}"])
    train_teacher.train(small(config, tmp_path / "run", 8, channels))
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("experiment", of_kind("/autoencoder"))
def test_autoencoder_presets(experiment, tmp_path):
    config = small(compose("train_autoencoder", [f"experiment={experiment}"]), tmp_path / "run", 8)
    config.preview.num_samples = 17  # one more than there are
    train_autoencoder.train(config)
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("experiment", of_kind("stage1"))
def test_stage1_presets(experiment, tmp_path):
    channels, config = prepared(experiment, "distill_guidance", tmp_path)
    path = distill_guidance.distill(small(config, tmp_path / "run", 8, channels))
    assert Path(path).exists()


@pytest.mark.parametrize("experiment", of_kind("stage2") + of_kind("/encoder"))
def test_stage2_presets(experiment, tmp_path):
    channels, config = prepared(experiment, "distill_steps", tmp_path)
    config = OmegaConf.merge(small(config, tmp_path / "run", 8, channels), {"start_steps": 4, "last_steps": 1})
    OmegaConf.update(config, "stages", {}, merge=False)
    assert list(distill_steps.distill(config)) == [2, 1]


@pytest.mark.parametrize("experiment", [*of_kind("trajectory"), *of_kind("consistency"), *of_kind("flow_map")])
def test_presets_of_one_round(experiment, tmp_path):
    channels, config = prepared(experiment, "distill_steps", tmp_path)
    ((num_steps, path),) = distill_steps.distill(small(config, tmp_path / "run", 8, channels)).items()
    assert num_steps == (0 if experiment.endswith("flow_map") else 4) and Path(path).exists()


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if name.startswith("few_steps/")])
def test_presets_of_every_size_state_known_settings(experiment):
    script = "distill_guidance" if experiment.endswith("stage1") else "distill_steps"
    check_settings(plain(compose(script, [f"experiment={experiment}"])), script)


def prepared(experiment, script, folder):
    """Channels of the images, and the config with a tiny teacher of the right kind in place of its own."""
    channels = 1 if experiment.startswith("digits") else 3
    # Public latent models are of discrete time; their presets sample on its levels.
    table = linear_table()
    discrete = {"preconditioning": {"name": "eps", "table": "linear"}}
    discrete |= {"sigma_min": float(table[0]), "sigma_max": float(table[-1])}
    latent = discrete if "_latent_" in experiment else {}
    teacher = tiny_denoiser(data_shape=[channels, 8, 8], num_classes=10, **latent)
    if script == "distill_steps":
        teacher = guidance_student(teacher, (0.0, 4.0))
    save_denoiser(teacher, folder / "teacher.safetensors")
    config = compose(script, [f"experiment={experiment}"])
    return channels, OmegaConf.merge(config, {"teacher": str(folder / "teacher.safetensors")})


def test_a_stochastic_student_is_sampled_stochastically(tmp_path):
    _, config = prepared("digits/stage2", "distill_steps", tmp_path)
    config = OmegaConf.merge(small(config, tmp_path / "run", 8, 1), {"start_steps": 8, "sampler": "stochastic"})
    OmegaConf.update(config, "stages", {}, merge=False)
    paths = distill_steps.distill(config)
    from diffdistill import load_denoiser
    from diffdistill.sampling.generation import generate
    from diffdistill.sampling.plans import plan

    student = load_denoiser(paths[4])
    assert isinstance(student.distilled, Distilled) and student.distilled.sampler == "stochastic"
    planned = plan(student, w=1.0)
    assert planned.solver.stochastic
    labels = torch.tensor([1, 2, 3])
    together = torch.cat(list(generate(planned, [5, 6, 7], labels)))
    alone = torch.cat(list(generate(planned, [5, 6, 7], labels, batch_size=1)))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in names("solver") if name != "learned"])  # which needs a file
def test_solver_configs(name):
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/solver" / f"{name}.yaml"))
    assert options["name"] == name
    make_solver(**options)


@pytest.mark.parametrize("name", [name for name in names("schedule") if name != "gits"])  # which needs a model
def test_schedule_configs(name):
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/schedule" / f"{name}.yaml"))
    ends = {"num_steps": 5, "sigma_min": 0.01, "sigma_max": 14.614641229333639}
    assert len(make_schedule(**{**ends, **options})) == 6


def test_every_preset_belongs_to_a_script():
    known = tuple(ending for endings in PRESETS.values() for ending in endings) + ("none",)
    others = [name for name in names("experiment") if not name.endswith(known) and not name.startswith("zhou2024/")]
    assert not others


@pytest.mark.parametrize(
    ("script", "preset"),
    [
        *(("train_teacher", name) for name in of_kind("teacher")),
        *(("distill_guidance", name) for name in of_kind("stage1")),
        *(("distill_steps", name) for name in (*of_kind("stage2"), *of_kind("trajectory"))),
        ("analyze_trajectories", None),
        ("compare_solvers", None),
        ("gaussian_stats", None),
    ],
)
def test_samples_take_the_place_of_the_data(script, preset):
    chosen = [f"experiment={preset}"] if preset else []
    config = compose(script, [*chosen, "data=samples", "data.path=FILE"])
    assert config.data == {"name": "samples", "path": "FILE"}
