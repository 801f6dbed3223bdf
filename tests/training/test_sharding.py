"""What fsdp does not split, and says so."""

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from diffdistill.training import Run, Trainer, sharding
from tests.training.problems import Fit, Rows, settings


def test_an_old_pytorch_is_refused_before_it_splits(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(ValueError, match=r"fsdp needs a PyTorch later than 2\.6\.0: update it, or choose ddp"):
        sharding.shard(torch.nn.Linear(2, 3), torch.device("cpu"))


def test_what_is_not_called_as_a_whole_is_not_split(tmp_path, monkeypatch):
    objective, run = Fit(), Run(tmp_path, {})
    objective.trained = nn.ModuleList(objective.trained)
    monkeypatch.setattr("diffdistill.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="fsdp is for models that are called as a whole, which ModuleList is not"):
        Trainer(objective, Rows(), settings(parallel="fsdp"), run)
