"""Devices without float64, such as Apple's: no tensor of that dtype is ever made on one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill.models.preconditioning import EpsPrediction
from diffdistill.solvers import SOLVERS, AMEDPlugin, LearnedTable, make_schedule, make_solver, sample
from diffdistill.solvers.amed import AMEDPredictor, LinearSteps, LinearTable
from diffdistill.solvers.amed.network import embed


class NoFloat64(TorchDispatchMode):
    """Refuses tensors of float64 on the device "meta", which stands for one that has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and leaf.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


SIGMAS = make_schedule("polynomial", num_steps=5, sigma_min=0.1, sigma_max=14.0)
NAMES = [name for name in SOLVERS if name not in ("ddim", "amed", "flow_map")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last", [0.1, 0.0])
def test_solvers(name, last):
    noise = torch.empty(3, 2, 5, 7, device="meta")
    sigmas = torch.cat([SIGMAS[:-1], SIGMAS.new_tensor([last])])
    with NoFloat64():
        x = sample(lambda x, sigma, cond: x.tanh() * sigma[0], noise, solver=make_solver(name), sigmas=sigmas)
    assert x.device.type == "meta" and x.dtype == torch.float32


@pytest.mark.parametrize(
    ("form", "inner", "table"),
    [(AMEDPlugin, "ipndm", LearnedTable), (AMEDPlugin, "dpm2", LearnedTable), (LinearSteps, "deis", LinearTable)],
)
def test_learned_solvers(form, inner, table):
    noise = torch.empty(3, 2, 5, 7, device="meta")
    with NoFloat64():
        solver = form(make_solver(inner), table(5).to("meta"))
        x = sample(lambda x, sigma, cond: x.tanh() * sigma[0], noise, solver=solver, sigmas=SIGMAS)
    assert x.shape == noise.shape


def test_what_the_predictor_embeds():
    with NoFloat64():
        assert AMEDPredictor(initial_r=0.3).to("meta").offsets.dtype == torch.float32
        assert embed(torch.empty(3, device="meta")).dtype == torch.float32


def test_tables_of_noise_levels():
    with NoFloat64():
        table = EpsPrediction().to("meta")
        sigma = torch.empty(3, device="meta")
        assert {c(sigma).dtype for c in (table.c_skip, table.c_out, table.c_in, table.c_noise)} == {torch.float32}
    assert EpsPrediction().half().log_table.dtype == torch.float64
