"""`scripts/train_amed.py` with presets of every form, on a tiny denoiser, for two updates."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from diffdistill.learned import initial_levels, load_predictor, make_learned
from diffdistill.models import guided, save_denoiser
from diffdistill.sampling.generation import count_nfe, generate
from diffdistill.sampling.plans import plan
from diffdistill.solvers import GaussianStatistics, sample, save_gaussian, seeded_noise
from diffdistill.training import NonFiniteLossError
from tests.builders import tiny_denoiser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

FOLDERS = {"zhou2024": "*.yaml", "digits": "*nfe.yaml", "emoji": "*nfe.yaml"}
PRESETS = sorted(
    f"{folder}/{path.stem}"
    for folder, pattern in FOLDERS.items()
    for path in (ROOT / "configs" / "experiment" / folder).glob(pattern)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_denoiser(tiny_denoiser(), path)
    return path


def statistics(model):
    """Statistics of data in the shape of the tiny denoiser, for its analytic start."""
    path = model.with_name("statistics.safetensors")
    if not path.exists():
        save_gaussian(GaussianStatistics.fit(torch.randn(200, *tiny_denoiser().data_shape)), path)
    return path


def train(preset, model, out, *overrides):
    import train_amed
    from common.configs import compose

    small = ["trainer.updates=2", "trainer.batch_size=4", "trainer.device=cpu"]
    config = compose("train_amed", [f"experiment={preset}", f"model={model}", f"out={out}", *small, *overrides])
    if config.objective.name == "endpoint":
        config.objective.trajectories, config.objective.teacher_schedule.num_steps = 8, 6
    if config.start:
        config.start.statistics = str(statistics(model))
    train_amed.train(config)
    return load_predictor(out / "predictor.safetensors"), config


def test_the_presets_are_all_there():
    rows = {"amed_cifar10", "amed_ffhq", "amed_imagenet64", "amed_bedroom", "plugin_cifar10", "plugin_ffhq"}
    rows |= {"plugin_imagenet64", "plugin_bedroom_latent", "plugin_stable_diffusion"}
    forms = ("amed", "plugin", "plugin_dpmpp", "amed_endpoint", "plugin_endpoint", "linear", "linear_start")
    own = {f"{form}_{nfe}nfe" for form in forms for nfe in (3, 5, 7, 9)}
    assert {f"zhou2024/{name}" for name in rows} | {f"digits/{name}" for name in own} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_the_evaluations_of_its_name(preset):
    from common.configs import compose

    config = OmegaConf.to_container(compose("train_amed", [f"experiment={preset}"]), resolve=True)
    ends = {"sigma_min": 0.002, "sigma_max": config["start"]["sigma"] if config["start"] else 80.0}
    sigmas, predictor = initial_levels({**ends, **config["schedule"]}, config["num_steps"], config["predictor"])
    learned = make_learned(config["form"], inner=config["inner"], predictor=predictor, sigmas=sigmas)
    if preset.endswith("nfe"):
        assert preset.endswith(f"_{learned.nfe}nfe")
    published = config["objective"]["name"] == "stepwise"
    assert config["predictor"].get("initial") == ("published" if published else None)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if not preset.endswith(("_3nfe", "_7nfe", "_9nfe"))])
def test_every_preset_trains_and_samples(preset, model, tmp_path):
    learned, config = train(preset, model, tmp_path)
    denoiser = tiny_denoiser()
    denoiser = denoiser if config.w is None else guided(denoiser, config.w)
    x = learned.sample(denoiser, torch.randn(3, *denoiser.data_shape), torch.tensor([0, 1, 2]))
    assert x.isfinite().all()
    assert "command" in learned.provenance


def test_a_missing_model_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="get it from https"):
        train("zhou2024/amed_cifar10", tmp_path / "absent.pkl", tmp_path / "absent")


def test_the_sampling_plan_takes_a_learned_solver_and_refuses_the_wrong_one(model, tmp_path):
    learned, _ = train("digits/plugin_3nfe", model, tmp_path)
    options = {"name": "learned", "predictor": tmp_path / "predictor.safetensors"}
    planned = plan(tiny_denoiser(), solver=options)
    assert count_nfe(planned) == learned.nfe == 3 and torch.equal(planned.sigmas, learned.sigmas)
    with pytest.raises(ValueError, match="trained for 2 steps"):
        plan(tiny_denoiser(), solver=options, num_steps=5)
    with pytest.raises(ValueError, match="this one has 1"):
        plan(tiny_denoiser(), solver=options, w=1.0)
    with pytest.raises(ValueError, match="fingerprint"):
        plan(tiny_denoiser(seed=1), solver=options)
    with pytest.raises(ValueError, match="leave out schedule"):
        plan(tiny_denoiser(), solver=options, schedule={"name": "logsnr"})


def test_a_training_that_diverges_leaves_the_last_good_predictor(model, tmp_path):
    """At update 3, as the limit is passed; the checkpoint after update 2 is the last good one."""
    with pytest.raises(NonFiniteLossError) as caught:
        train(
            "digits/linear_3nfe",
            model,
            tmp_path,
            "trainer.updates=40",
            "trainer.learning_rate=100",
            "trainer.decay=constant",
            "trainer.clip=null",
            "trainer.checkpoint_every=1",
            "trainer.seed=3",
        )
    message = str(caught.value)
    assert "the loss is inf at update" in message and "seed 3, step" in message and "to sigma = " in message
    kept = load_predictor(tmp_path / "last_good.safetensors")
    assert f"{caught.value.update - 1} updates is {tmp_path / 'last_good.safetensors'}" in message
    denoiser = tiny_denoiser()
    assert kept.sample(denoiser, torch.randn(3, *denoiser.data_shape), torch.tensor([0, 1, 2])).isfinite().all()
    assert not (tmp_path / "predictor.safetensors").exists()


def test_a_solver_is_sampled_with_the_thresholding_that_it_was_trained_with(model, tmp_path):
    learned, _ = train("digits/plugin_dpmpp_3nfe", model, tmp_path)
    assert learned.thresholding == "dynamic"
    denoiser, noise = tiny_denoiser(), seeded_noise(range(3), tiny_denoiser().data_shape)
    cond = torch.tensor([0, 1, 2])
    x = learned.sample(denoiser, noise, cond)
    options = {"solver": learned.solver, "sigmas": learned.sigmas, "cond": cond}
    assert torch.equal(x, sample(denoiser, noise, thresholding="dynamic", **options))
    assert not torch.allclose(x, sample(denoiser, noise, **options), rtol=1e-3)
    scheme = plan(denoiser, solver={"name": "learned", "predictor": tmp_path / "predictor.safetensors"})
    torch.testing.assert_close(next(generate(scheme, range(3), cond)), x)
