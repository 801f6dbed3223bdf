"""What reads each group of settings: the functions and classes whose options are its settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffdistill.data import DATA_SETS
from diffdistill.interop.diffusers.adapters import Adapters
from diffdistill.learned.recipe import OBJECTIVES
from diffdistill.learned.storage import PREDICTORS
from diffdistill.models.building import ENTRIES, NETWORKS
from diffdistill.models.guidance import GUIDANCES
from diffdistill.models.preconditioning import PRECONDITIONINGS
from diffdistill.registry import resolve
from diffdistill.solvers import SCHEDULES, SOLVERS
from diffdistill.tables.tables import Row, Table
from diffdistill.training import TrainerConfig
from diffdistill.training.noise_levels import NOISE_LEVELS

BY_NAME: dict[str, Mapping[str, Any]] = {
    "data": DATA_SETS,
    "guidance": GUIDANCES,
    "network": NETWORKS,
    "noise_levels": NOISE_LEVELS,
    "objective": OBJECTIVES,
    "preconditioning": PRECONDITIONINGS,
    "predictor": PREDICTORS,
    "schedule": SCHEDULES,
    "solver": SOLVERS,
}
"""Groups whose `name` chooses who reads the rest."""
WHOLE: dict[str, Any] = {"lora": Adapters, "row": Row, "table": Table, "trainer": TrainerConfig}
"""Groups of one reader."""
KINDS = {
    **{kind: kind for kind in (*BY_NAME, *WHOLE)},
    "inner": "solver",
    "rows": "row",
    "schedules": "schedule",
    "solvers": "solver",
    "stages": "trainer",
    "teacher": "solver",
    "teacher_schedule": "schedule",
}
"""The kind of a group by its name; of one in a list or a mapping of such, by the name of that."""
MEMBERS = ("rows", "schedules", "solvers", "stages")
EXTRA = {"learned": ("predictor",)}
"""Options that a choice has beside those of its reader."""
MODEL = [entry for entry in ENTRIES if entry not in ("format", "distilled", "autoencoder", "provenance")]
"""What the settings of a new model have."""
FILLED = {"cond", "denoiser", "noise", "null", "sigmas", "start", "w"}
"""Options of readers that are no settings, since commands fill them."""


def kind_of(path: Sequence[str]) -> str | None:
    """The kind of the group at a path such as `("stages", "4")`, or None for one that is no such group."""
    if len(path) > 1 and path[-2] in MEMBERS:
        return KINDS[path[-2]]
    return None if path[-1] in MEMBERS else KINDS.get(path[-1])


def options_of(kind: str, name: Any = None) -> list[str] | None:
    """The options of a group, without `name`; None where nothing is known of them."""
    if kind in WHOLE:
        return [field.name for field in dataclasses.fields(WHOLE[kind]) if (kind, field.name) != ("table", "name")]
    if name in EXTRA:
        return list(EXTRA[name])
    reader = BY_NAME[kind].get(name) if kind in BY_NAME else None
    if reader is None:
        return None
    parameters = inspect.signature(resolve(reader)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    found = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if kind == "noise_levels" and "sigmas" in found:
        found.append("schedule")
    return [option for option in found if option not in FILLED]
