"""Parity with the published solvers, all 381 runs without a plugin."""

import pytest
import torch

from diffdistill.solvers import sample
from tests.solvers.reference import Case, arrays, cases, mixture

PLAIN = cases(plugin=False)


def test_no_case_is_missing():
    assert len(PLAIN) == 381
    assert len(cases(plugin=True)) == 120


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_end_point_and_nfe(case: Case):
    options = dict(
        solver=case.solver(),
        sigmas=case.sigmas(),
        denoise_to_zero=case.settings.get("denoise_to_zero", False),
        thresholding=case.settings.get("thresholding"),
    )
    run = sample(mixture(), arrays()["noise"], return_trajectory=True, **options)
    assert run.nfe == case.settings["nfe"]
    assert len(run.x) == len(run.sigmas) == case.settings["num_steps"] + 1 + options["denoise_to_zero"]
    # The reference integrates DEIS "tab" by a Riemann sum; ours is exact.
    tolerance = 1e-4 if case.settings.get("deis_mode") == "tab" else 1e-8
    assert relative_error(run.x[-1], case.end) < tolerance
    single = sample(mixture(), arrays()["noise"].float(), **options)
    assert single.dtype == torch.float32
    assert relative_error(single, case.end) < 1e-3


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst over the samples."""
    difference = (x.double() - expected).flatten(1).norm(dim=1)
    return (difference / expected.flatten(1).norm(dim=1)).max().item()
