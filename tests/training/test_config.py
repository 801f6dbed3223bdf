import math

import pytest

from diffdistill.training import TrainerConfig
from tests.training.problems import settings


def test_the_learning_rate_warms_up_and_decays_to_zero():
    rates = {
        decay: [settings(updates=12, warmup=4, learning_rate=8.0, decay=decay).learning_rate_at(k) for k in range(13)]
        for decay in ("constant", "linear", "cosine")
    }
    for rate in rates.values():
        assert rate[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates["constant"][5:] == [8.0] * 8
    assert rates["linear"][4:] == pytest.approx([8.0 - k for k in range(9)])
    assert rates["cosine"][4:] == pytest.approx([4 * (1 + math.cos(math.pi * k / 8)) for k in range(9)])


def test_the_average_has_a_half_life_in_samples_that_ramps_up():
    config = settings(batch_size=12, ema_half_life=120.0, ema_rampup=0.5)
    assert config.ema_decay_at(0) == 0.0
    assert config.ema_decay_at(4) == pytest.approx(0.5 ** (12 / 24))
    assert config.ema_decay_at(1000) == pytest.approx(0.5 ** (12 / 120))
    assert settings(batch_size=12, ema_half_life=120.0, ema_rampup=None).ema_decay_at(0) ** 10 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates must be an integer of at least 1, but is 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, but is 2.5"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, but is True"),
        ({"accumulation": 5}, "batch_size=12 does not divide into accumulation=5 parts"),
        ({"learning_rate": "fast"}, "learning_rate must be a positive number, but is 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, but is nan"),
        ({"optimizer": "adma"}, "optimizer must be one of adam, adamw, sgd, adam8bit, adamw8bit, but is 'adma'"),
        ({"decay": "stairs"}, "decay must be one of constant, linear, cosine, step, but is 'stairs'"),
        ({"precision": "fp16"}, "precision must be one of auto, fp32, bf16, but is 'fp16'"),
        ({"betas": [0.9, 1.0]}, r"betas must be two numbers in \[0, 1\), but is \(0.9, 1.0\)"),
        ({"clip": -1}, "clip must be a positive number or null, but is -1"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, but is -1"),
        ({"compile": "yes"}, "compile must be true or false, but is 'yes'"),
        ({"lr": 1.0}, "the trainer has no setting 'lr': it takes updates, batch_size, .*"),
    ],
)
def test_bad_settings_are_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="needs the setting 'batch_size'"):
        TrainerConfig.from_dict({"updates": 3})
