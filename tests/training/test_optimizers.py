"""The optimisers by name: 8-bit moments where bitsandbytes is installed, and what is said where it is not."""

import sys

import pytest
import torch
from torch import nn

from diffdistill.training import Run, Trainer
from diffdistill.training.optimizers import make_optimizer
from tests.training.problems import Fit, HeldRows, settings


class Wide(Fit):
    """A network with tensors of 4096 numbers and more, which are the ones whose moments have 8 bits."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.trained = nn.Sequential(nn.Linear(5, 1024), nn.Tanh(), nn.Linear(1024, 5))


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit"])
def test_a_missing_package_is_named_in_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install bitsandbytes") as error:
        make_optimizer([nn.Parameter(torch.zeros(3))], settings(optimizer=name))
    assert "\n" not in str(error.value)


def test_moments_of_eight_bits_train_and_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")

    def train(folder, updates, optimizer="adam8bit"):
        changes = {"optimizer": optimizer, "updates": updates, "decay": "constant", "learning_rate": 1e-2}
        torch.manual_seed(0)
        run = Run(tmp_path / folder, {})
        trainer = Trainer(Wide(), HeldRows(), settings(**changes), run)
        trainer.train()
        return trainer, run.metrics()[-1]["loss"]

    whole, loss = train("whole", 20)
    train("parts", 11)
    resumed, _ = train("parts", 20)
    torch.testing.assert_close(
        resumed.objective.trained.state_dict(), whole.objective.trained.state_dict(), rtol=0, atol=0
    )
    moments = [v for state in whole.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert any(v.dtype == torch.uint8 for v in moments)
    _, exact = train("exact", 20, "adam")
    assert loss == pytest.approx(exact, rel=0.05)
