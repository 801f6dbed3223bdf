"""Learned solvers as files: tens of kilobytes that say what they were trained for, and refuse anything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.files.records import FileKind
from diffdistill.models.guidance import ClassifierFreeGuidance, GuidanceConditioned
from diffdistill.models.loading import fingerprint
from diffdistill.models.storage import load_state
from diffdistill.registry import choose, construct
from diffdistill.solvers import (
    AMED,
    AMEDPlugin,
    AMEDPredictor,
    GaussianStart,
    LearnedTable,
    Predictor,
    load_gaussian,
    make_solver,
)
from diffdistill.solvers import sample as sample_with
from diffdistill.solvers.amed import LearnedSteps, LinearSteps, LinearTable
from diffdistill.solvers.integration import THRESHOLDING
from diffdistill.solvers.schedules import check_sigmas

PREDICTOR = FileKind("predictor", key="diffdistill_predictor", folder="predictors")

PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "amed": AMEDPredictor,
    "table": LearnedTable,
    "linear": LinearTable,
}
FORMS: dict[str, Callable[..., AMEDPlugin | LearnedSteps]] = {
    "amed": lambda predictor, inner: AMED(predictor, **inner),
    "plugin": lambda predictor, inner: AMEDPlugin(make_solver(**inner), predictor),
    "steps": lambda predictor, inner: LearnedSteps(make_solver(**inner), predictor),
    "linear": lambda predictor, inner: LinearSteps(make_solver(**inner), predictor),
}
"""What a predictor can be put into: AMED-Solver, the plugin around a solver, the corrected steps of a solver, or those
with learned weights of all past answers."""


@dataclass(frozen=True, eq=False)
class LearnedSolver:
    """A trained solver with the noise levels that it was trained on.

    Attributes:
        form: one of `FORMS`.
        inner: options of the solver inside (of `make_solver`; for the form "amed", `afs` alone).
        predictor: options of the predictor, `name` and those of its class.
        sigmas: float64 `[N + 1]`.
        solver: what `sample` takes.
        start: an analytic start: `statistics`, the name or path of those that `load_gaussian` takes, and `sigma`.
        thresholding: of every prediction of x0, by name as for `sample`, or None.
        trained_for: `identity` of the denoiser, or None while there is none.
        provenance: what made it.
    """

    form: str
    inner: Mapping[str, Any]
    predictor: Mapping[str, Any]
    sigmas: Tensor
    solver: AMEDPlugin | LearnedSteps
    start: Mapping[str, Any] | None = None
    thresholding: str | None = None
    trained_for: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Intervals of the schedule, N."""
        return len(self.sigmas) - 1

    @property
    def nfe(self) -> int:
        """Evaluations of one run of an unguided denoiser."""
        return self.solver.stages * self.num_steps - bool(self.solver.afs)

    def check(self, denoiser: nn.Module, *, num_steps: int | None = None) -> None:
        """Raise `ValueError` unless this was trained for the denoiser, its guidance weight and the number of steps."""
        if num_steps not in (None, self.num_steps):
            raise ValueError(
                f"num_steps={num_steps}: this predictor was trained for {self.num_steps} steps ({self.nfe} evaluations)"
            )
        if self.trained_for is None:
            return
        given, wanted = identity(denoiser), {**self.trained_for, "w": self.trained_for["w"] or None}
        if given != wanted:
            what = "fingerprint" if given["fingerprint"] != wanted["fingerprint"] else "w"
            raise ValueError(
                f"this predictor was trained for a denoiser with {what} {wanted[what]}, but this one has {given[what]}"
            )

    def sample(self, denoiser: nn.Module, noise: Tensor, cond: Any = None, **options: Any) -> Any:
        """`diffdistill.sample` with this solver and its levels, after `check`; `options` are those of `sample`."""
        self.check(denoiser)
        options.setdefault("thresholding", self.thresholding)
        return sample_with(
            denoiser, noise, solver=self.solver, sigmas=self.sigmas, cond=cond, start=self.gaussian_start(), **options
        )

    def gaussian_start(self, *, device: torch.device | str = "cpu") -> GaussianStart | None:
        """The analytic start with its statistics on a device, or None if the runs begin with noise."""
        if self.start is None:
            return None
        return GaussianStart(load_gaussian(self.start["statistics"], device=device), float(self.start["sigma"]))


def identity(denoiser: nn.Module) -> dict[str, Any]:
    """Which denoiser this is: the fingerprint of its config and weights, and its guidance weight.

    None stands for no guidance, and for the weight 0, which guides nothing.

    Raises:
        ValueError: a weight per sample, which no predictor is trained for.
    """
    w = None
    if isinstance(denoiser, (ClassifierFreeGuidance, GuidanceConditioned)):
        if isinstance(denoiser.w, Tensor):
            raise ValueError("a learned solver belongs to one guidance weight: give w as a number, not one per sample")
        w, inner = float(denoiser.w) or None, denoiser.denoiser
        assert isinstance(inner, nn.Module)
        denoiser = inner
    return {"fingerprint": fingerprint(denoiser), "w": w}


def make_learned(
    form: str,
    *,
    predictor: Mapping[str, Any],
    sigmas: Tensor,
    inner: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    thresholding: str | None = None,
    trained_for: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> LearnedSolver:
    """Build a learned solver with a fresh predictor; arguments are the attributes of `LearnedSolver`.

    Raises:
        ValueError: an unknown form, predictor or solver, an option out of range, levels that do not decrease.
        TypeError: an option that does not exist, or a solver that cannot be learned in this form.
    """
    sigmas = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64))
    options, inner = dict(predictor), dict(inner or {})
    name, intervals = options.pop("name", None), len(sigmas) - 1 - bool(sigmas[-1] == 0)
    if name in ("table", "linear") and options.setdefault("num_intervals", intervals) != intervals:
        raise ValueError(f"num_intervals={options['num_intervals']}: the noise levels make {intervals} intervals")
    if thresholding is not None:
        choose("thresholding", thresholding, THRESHOLDING)
    built = construct("predictor", str(name), PREDICTORS, **options)
    if built.num_intervals not in (None, intervals):
        raise ValueError(f"initial_r is for {built.num_intervals} intervals: the noise levels make {intervals}")
    built.num_intervals = intervals
    return LearnedSolver(
        form=form,
        inner=inner,
        predictor=dict(predictor),
        sigmas=sigmas,
        solver=choose("form", form, FORMS)(built, inner),
        start=start,
        thresholding=thresholding,
        trained_for=trained_for,
        provenance=dict(provenance or {}),
    )


def save_predictor(learned: LearnedSolver, path: str | os.PathLike[str]) -> None:
    """Write a learned solver to one .safetensors file, whole or not at all."""
    record = {
        "form": learned.form,
        "inner": dict(learned.inner),
        "predictor": dict(learned.predictor),
        "sigmas": learned.sigmas.tolist(),
        "nfe": learned.nfe,
        "start": learned.start,
        "thresholding": learned.thresholding,
        "trained_for": learned.trained_for,
        "provenance": dict(learned.provenance),
    }
    PREDICTOR.write(path, record, learned.solver.predictor.state_dict())


def load_predictor(name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LearnedSolver:
    """Load a learned solver.

    Args:
        name_or_path: a shipped one (`shipped_predictors()` lists them), a file that `save_predictor` wrote, or the
            folder of the run that made it.
        device: where to put the predictor.

    Raises:
        ValueError: there is no such file, or it is corrupted, of another version, or holds no predictor.
    """
    result = Path(name_or_path) / "predictor.safetensors"
    path = PREDICTOR.find(result if result.is_file() else name_or_path)
    record, state = PREDICTOR.read(path)
    del record["format"]
    try:
        nfe, sigmas = record.pop("nfe"), torch.tensor(record.pop("sigmas"), dtype=torch.float64)
        learned = make_learned(record.pop("form"), sigmas=sigmas, **record)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the record in {path} builds no solver: {error}") from None
    if learned.nfe != nfe:
        raise ValueError(f"{path} states {nfe} evaluations, but its record makes {learned.nfe}: the file is damaged")
    load_state(learned.solver.predictor, state, source=str(path))
    learned.solver.predictor.to(device).eval().requires_grad_(False)
    return learned


def shipped_predictors() -> dict[str, Path]:
    """The predictors that come with the package, by name."""
    return PREDICTOR.shipped()
