"""Options of what is chosen by name: those that do not exist, and values of another type than is annotated."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch

from diffdistill.data import DATA_SETS
from diffdistill.learned.recipe import OBJECTIVES
from diffdistill.learned.storage import PREDICTORS
from diffdistill.metrics.extractors import FEATURES
from diffdistill.models.building import NETWORKS
from diffdistill.models.preconditioning import PRECONDITIONINGS
from diffdistill.registry import check_options, choose, construct, resolve
from diffdistill.solvers import SCHEDULES, SOLVERS
from diffdistill.training.noise_levels import NOISE_LEVELS
from diffdistill.training.weighting import WEIGHTINGS


def example(
    first: Any,
    *,
    count: int = 1,
    rate: float = 0.5,
    most: float | None = None,
    whole: bool = True,
    name: str | None = None,
    parts: Sequence[int] = (),
    inner: Mapping[str, Any] | None = None,
    kind: Literal["a", "b"] = "a",
    levels: Sequence[float] | torch.Tensor = (),
):
    return first, count, rate, most, whole, name, parts, inner, kind, levels


class Example:
    def __init__(self, size: int) -> None:
        self.size = size


TABLE = {"function": example, "class": Example}


def test_values_of_the_annotated_types_pass():
    good = {
        "count": np.int64(3),
        "rate": torch.tensor(0.1),
        "most": None,
        "whole": False,
        "name": "x",
        "parts": (1, 2),
        "inner": {},
        "kind": "b",
        "levels": torch.ones(3),
    }
    assert construct("example", "function", TABLE, 0, **good)[0] == 0
    assert construct("example", "function", TABLE, "positional", rate=np.float32(1), most=3)[3] == 3
    assert construct("example", "class", TABLE, size=4).size == 4


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("count", "3", "count must be an integer, but is '3'"),
        ("count", True, "count must be an integer, but is True"),
        ("rate", None, "rate must be a number, but is None"),
        ("rate", [0.5], r"rate must be a number, but is \[0.5\]"),
        ("most", "large", "most must be a number or null, but is 'large'"),
        ("whole", 1, "whole must be true or false, but is 1"),
        ("name", 7, "name must be text or null, but is 7"),
        ("parts", "12", "parts must be a list, but is '12'"),
        ("inner", [1], r"inner must be a mapping or null, but is \[1\]"),
    ],
)
def test_other_values_are_named_with_what_is_valid(option, value, words):
    with pytest.raises(ValueError, match=f"^example 'function': {words}$"):
        construct("example", "function", TABLE, 0, **{option: value})


def test_names_that_do_not_exist():
    with pytest.raises(TypeError, match="example 'function' has no option 'first': it takes count, rate, "):
        construct("example", "function", TABLE, 0, first=1)
    with pytest.raises(TypeError, match="example 'class' has no option 'sise': it takes size"):
        construct("example", "class", TABLE, sise=1)
    for name in ("clas", None, 3, ["class"], {"class": 1}):
        with pytest.raises(ValueError, match="unknown example .*: choose one of class, function"):
            choose("example", name, TABLE)


TABLES = {**SOLVERS, **SCHEDULES, **DATA_SETS, **NETWORKS, **PRECONDITIONINGS, **WEIGHTINGS, **PREDICTORS, **OBJECTIVES}


@pytest.mark.parametrize(
    "make",
    [resolve(entry) for entry in (*TABLES.values(), *NOISE_LEVELS.values(), *FEATURES.values())],
    ids=lambda m: m.__name__,
)
def test_all_that_is_chosen_by_name_can_be_checked(make):
    check_options("it", make, {})
