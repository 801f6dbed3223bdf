"""End points of 501 runs of the published solvers (zju-pi/diff-sampler) on a Gaussian mixture, in float64."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffdistill.models import GaussianMixture
from diffdistill.solvers import Solver, make_schedule, make_solver

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {"max_order": "order", "deis_mode": "mode", "variant": "variant", "lower_order_final": "lower_order_final"}


@cache
def arrays() -> dict[str, Tensor]:
    with np.load(DATA / "solvers.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@cache
def mixture() -> GaussianMixture:
    data = arrays()
    return GaussianMixture(data["weights"], data["means"], data["variances"])


@dataclass(frozen=True)
class Case:
    """One run: `settings` are those of the reference, `end: [4, 3, 4, 4]` is its last point."""

    row: int
    settings: dict

    def __str__(self) -> str:
        s = self.settings
        words = [s["solver"], s.get("max_order", ""), s.get("deis_mode", s.get("variant", "")), s["schedule"], self.row]
        return "-".join(str(word) for word in words if word != "")

    @property
    def end(self) -> Tensor:
        return arrays()["endpoints"][self.row]

    def solver(self) -> Solver:
        options = {ours: self.settings[theirs] for theirs, ours in OPTIONS.items() if theirs in self.settings}
        if "predict_x0" in self.settings:
            options["prediction"] = "x0" if self.settings["predict_x0"] else "eps"
        return make_solver(self.settings["solver"], afs=self.settings["afs"], **options)

    def sigmas(self) -> Tensor:
        options = {k: self.settings[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho") if k in self.settings}
        return make_schedule(self.settings["schedule"], **options)


def cases(*, plugin: bool) -> list[Case]:
    rows = json.loads((DATA / "solvers.json").read_text())
    return [Case(i, row) for i, row in enumerate(rows) if ("plugin" in row) == plugin]
