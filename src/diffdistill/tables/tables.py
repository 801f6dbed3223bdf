"""A table of results as data: rows of samplers, columns of evaluations or guidance weights, published values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from diffdistill.learned import shipped_predictors
from diffdistill.metrics.extractors import FEATURES
from diffdistill.metrics.measures import MEASURES
from diffdistill.models.storage import shipped_models
from diffdistill.registry import choose
from diffdistill.sampling.plans import statistics_of
from diffdistill.settings import Count, Finite, Integer, check_fields, check_names, check_values, hints_of
from diffdistill.solvers import SOLVERS, shipped_gaussians

STATISTICS = "statistics/"
"""Before the name of shipped statistics, which is that of their model."""
COLUMNS = {"nfe": "network evaluations", "num_steps": "steps", "w": "guidance weight w"}


@dataclass(frozen=True)
class Row:
    """One way to sample, across the columns. In `model`, `predictor` and `get`, {nfe}, {num_steps}, {w} and {intervals}
    (half of nfe, rounded up) stand for those of the cell.

    Attributes:
        name: what the table calls it.
        model: name or file of a denoiser; None takes the table's.
        solver: options of `make_solver`; None is Euler, or the own sampler of a few-step student.
        schedule: options of `make_schedule`; None takes the table's.
        predictor: name or file of a learned solver, in place of `solver` and `schedule`.
        num_steps: where it is not what the columns are.
        w: guidance weight, likewise; None guides nothing.
        start: the analytic start, as of `diffdistill.sampling.plans.plan`.
        published: one value for each column, None where there is none.
        source: of these values, where it is not the table's.
        get: how to get the files of this row that the table's `files` do not list.
        run: False for a row of published values only.
        only: the columns that the row has; None is all.
        note: what else the reader must know, in a few words.
    """

    name: str
    model: str | None = None
    solver: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    predictor: str | None = None
    num_steps: Count | None = None
    w: Finite | None = None
    start: float | Mapping[str, Any] | None = None
    published: Sequence[Finite | None] = ()
    source: str | None = None
    get: str | None = None
    run: bool = True
    only: Sequence[float] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Need:
    """A file that a cell needs.

    Attributes:
        path: where it is expected.
        get: how to get it.
        sha256: what it must be, or None if unknown.
    """

    path: str
    get: str
    sha256: str | None = None

    @property
    def missing(self) -> bool:
        return not located(self.path).exists()


def located(name: str) -> Path:
    """The file behind the name of a shipped model or predictor or of statistics, or behind a path."""
    statistics = {f"{STATISTICS}{known}": path for known, path in shipped_gaussians().items()}
    return {**statistics, **shipped_predictors(), **shipped_models()}.get(name, Path(name))


@dataclass(frozen=True)
class Cell:
    """One measurement of a table: what is sampled, resolved, and what was published.

    Attributes:
        row, column: where it stands.
        model, solver, schedule, predictor, num_steps, w, start: as of `Row`, resolved for the column.
        published: value, or None.
        source: of the published value.
        needs: files.
        impossible: why it cannot be measured, or None; such as three evaluations of a solver of two stages.
    """

    row: str
    column: float
    model: str
    solver: Mapping[str, Any] | None
    schedule: Mapping[str, Any] | None
    predictor: str | None
    num_steps: int | None
    w: float | None
    start: float | Mapping[str, Any] | None
    published: float | None
    source: str | None
    needs: tuple[Need, ...]
    impossible: str | None = None

    @property
    def slug(self) -> str:
        """A file name."""
        return f"{re.sub('[^a-z0-9]+', '-', self.row.lower()).strip('-')}__{self.column:g}"

    @property
    def missing(self) -> list[Need]:
        return [need for need in self.needs if need.missing]

    def settings(self) -> dict[str, Any]:
        """What decides the samples, but for the content of the files."""
        names = ("model", "solver", "schedule", "predictor", "num_steps", "w")
        begin = {} if self.start is None else {"start": self.start}
        return {name: getattr(self, name) for name in names} | begin


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        name: the name of its config.
        title: its heading.
        about: a sentence or two on what it shows.
        column: what the columns are: "nfe", "num_steps" or "w".
        columns: their values.
        rows: the rows.
        features: name of the feature extractor.
        reference: options of `load_data` under `data`, or the path of statistics under `file`.
        measures: names of measures; published values are of the first.
        num_samples: of each cell.
        seed: image i of every cell has the seed `seed + i`.
        splits: parts of the samples for the spread.
        model: of the rows that name none.
        schedule: of the rows that name none.
        source: of published values, where the row does not say.
        files: how to get files: `path: {url, sha256}`, or `path: URL`.
        command: what makes the table, where it is not diffdistill reproduce.
    """

    name: str
    title: str
    column: Literal["nfe", "num_steps", "w"]
    columns: Sequence[Finite]
    rows: Sequence[Row]
    reference: Mapping[str, Any]
    features: str = "inception"
    measures: Sequence[str] = ("fid",)
    num_samples: Count = 50_000
    seed: Integer = 0
    splits: Count = 5
    about: str = ""
    model: str | None = None
    schedule: Mapping[str, Any] | None = None
    source: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None

    @property
    def made_by(self) -> str:
        """The command that makes the table."""
        return self.command or f"diffdistill reproduce table={self.name}"

    @classmethod
    def from_dict(cls, name: str, config: Mapping[str, Any]) -> Table:
        """Build a table from its config, checked.

        Raises:
            TypeError: an entry that tables or rows do not have.
            ValueError: an unknown measure, solver or column, a row without a model, published values that do not fill
                the columns, or two rows of one name.
        """
        for group in ("rows", "columns", "measures"):
            if not isinstance(config.get(group, []), Sequence) or isinstance(config.get(group), str):
                raise TypeError(f"table {name}: {group} is a list, not {config[group]!r}")
        for row in config.get("rows", ()):
            if not isinstance(row, Mapping) or not isinstance(row.get("solver") or {}, Mapping):
                raise TypeError(f"table {name}: a row, and its solver, is a mapping such as {{name: ...}}, not {row!r}")
        rows = [Row(**_checked("row", row, Row)) for row in config.get("rows", ())]
        table = cls(name=name, **{**_checked("table", {**config, "name": name}, cls, drop="name"), "rows": rows})
        choose("column", table.column, COLUMNS)
        choose("feature extractor", table.features, FEATURES)
        for measure in table.measures:
            choose("measure", measure, MEASURES)
        if not rows or not table.columns or not table.measures:
            raise ValueError(f"table {name}: rows, columns and measures must not be empty")
        if not isinstance(table.reference, Mapping) or set(table.reference) not in ({"data"}, {"file"}):
            raise ValueError(f"table {name}: reference is data: OPTIONS or file: PATH, not {table.reference!r}")
        table._check_numbers()
        for row in rows:
            if row.published and len(row.published) != len(table.columns):
                values = f"{len(row.published)} published values for {len(table.columns)} columns"
                raise ValueError(f"table {name}: row {row.name!r} has {values}")
            if row.solver is not None:
                choose("solver", str(row.solver.get("name")), SOLVERS)
        cells = table.cells()
        twice = [cell for i, cell in enumerate(cells) if any(cell.slug == other.slug for other in cells[:i])]
        if twice:
            raise ValueError(f"table {name}: two rows would share the file {twice[0].slug!r}: rename {twice[0].row!r}")
        return table

    def _check_numbers(self) -> None:
        check_fields(self, what=f"table {self.name}")
        for row in self.rows:
            check_fields(row, what=f"table {self.name}, row {row.name}")
        if self.column != "w":
            check_values({"columns": self.columns}, {"columns": Sequence[Count]}, what=f"table {self.name}")
        if self.splits > self.num_samples:
            raise ValueError(f"table {self.name}: splits={self.splits} is more than num_samples={self.num_samples}")

    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [self.cell(row, i) for row in self.rows for i in range(len(self.columns))]

    def cell(self, row: Row, index: int) -> Cell:
        """The cell of a row in column number `index`."""
        column = self.columns[index]
        num_steps = int(column) if self.column == "num_steps" else row.num_steps
        w = float(column) if self.column == "w" else row.w
        published = row.published[index] if row.published else None
        impossible = None if row.run else "published values only"
        if row.only is not None and column not in row.only:
            impossible = "the row has no such column"
        if self.column == "nfe" and row.predictor is None:
            num_steps, problem = _steps_for(int(column), row.solver or {"name": "euler"})
            impossible = impossible or problem
        names = {"nfe": f"{column:g}", "num_steps": num_steps, "w": f"{w or 0:g}", "intervals": int(column + 1) // 2}
        model = (row.model or self.model or "").format(**names)
        predictor = None if row.predictor is None else row.predictor.format(**names)
        if not model and row.run:
            raise ValueError(f"table {self.name}: row {row.name!r} names no model, and the table has none")
        schedule = None if predictor else (row.schedule if row.schedule is not None else self.schedule)
        needs = [] if impossible else [self._need(path, row, names) for path in (model, predictor) if path]
        if row.start is not None and not impossible:
            needs.append(_statistics(model, row.start))
        if "file" in self.reference and not impossible:
            needs.append(self._need(str(self.reference["file"]), row, names))
        source = (row.source or self.source) if published is not None else None
        return Cell(
            row.name, column, model, row.solver, schedule, predictor, num_steps, w, row.start, published, source,
            tuple(needs), impossible,
        )  # fmt: skip

    def _need(self, path: str, row: Row, names: Mapping[str, Any]) -> Need:
        entry = self.files.get(path)
        if isinstance(entry, Mapping):
            return Need(path, str(entry.get("url", "")), entry.get("sha256"))
        if entry is None and row.get is None and not Path(path).suffix:
            return Need(path, "no such file, and nothing of that name comes with the package")
        return Need(path, str(entry or (row.get or "the config does not say how to get it").format(**names)))

    def digest(self, cell: Cell, hashes: Mapping[str, str | None]) -> str:
        """A hash of everything that decides a cell's result: settings, and the content of files by `hashes`."""
        common = {name: getattr(self, name) for name in ("features", "reference", "measures", "num_samples", "seed")}
        record = {**cell.settings(), **common, "splits": self.splits, "files": dict(hashes)}
        return hashlib.sha256(json.dumps(record, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _checked(kind: str, config: Mapping[str, Any], cls: type, *, drop: str = "") -> dict[str, Any]:
    check_names(f"a {kind}", config, hints_of(cls), noun="entry")
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # both are dataclasses.MISSING
    lacking = next((key for key in required if key not in config), None)
    if lacking is not None:
        raise TypeError(f"a {kind} needs an entry {lacking!r}: {config.get('name', dict(config))}")
    return {key: value for key, value in config.items() if key != drop}


def _statistics(model: str, start: float | Mapping[str, Any]) -> Need:
    """The statistics of an analytic start."""
    name = (start.get("statistics") if isinstance(start, Mapping) else None) or statistics_of(model)
    if name in shipped_gaussians():
        return Need(f"{STATISTICS}{name}", "they come with the package")
    return Need(name, f"diffdistill gaussian-stats model={model} beside=true")


def _steps_for(nfe: int, solver: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Steps of a solver that take exactly `nfe` evaluations of an unguided model, or why there are none."""
    stages = choose("solver", str(solver.get("name")), SOLVERS).stages
    total = nfe + bool(solver.get("afs", False))
    if total % stages or total < stages:
        return None, f"{solver['name']} takes {stages} evaluations a step"
    return total // stages, None
