"""Table configs: published values, settings that build, evaluations that are those of the columns, and bad configs."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffdistill.models import GaussianMixture
from diffdistill.sampling.generation import count_nfe
from diffdistill.sampling.plans import Plan
from diffdistill.solvers import make_schedule, make_solver
from diffdistill.tables.tables import Table

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path.stem for path in (ROOT / "configs/table").glob("*.yaml"))


def load(name):
    return Table.from_dict(name, OmegaConf.to_container(OmegaConf.load(ROOT / "configs/table" / f"{name}.yaml")))


def published():
    """`{table: (columns, {row: values})}` of the copy of the papers' tables."""
    found = {}
    for line in (ROOT / "tests/data/published.md").read_text().splitlines():
        if line.startswith("## "):
            name, _, columns = line[3:].partition(" | ")
            found[name] = ([float(c) for c in columns.split()], {})
        elif found and line.strip():
            columns, rows = found[name]
            texts = line.rsplit(" ", len(columns))
            rows[texts[0]] = [None if v == "-" else float(v) for v in texts[1:]]
    return found


def test_every_published_value_is_that_of_the_papers():
    copy = published()
    with_values = [name for name in TABLES if any(row.published for row in load(name).rows)]
    assert sorted(copy) == with_values
    for name, (columns, rows) in copy.items():
        table = load(name)
        assert list(table.columns) == columns, name
        assert {row.name: list(row.published) for row in table.rows} == rows, name
        assert all(cell.source for cell in table.cells() if cell.published is not None)


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_takes_the_evaluations_of_its_column(name):
    table = load(name)
    model = GaussianMixture(weights=[0.5, 0.5], means=[[[-0.5]], [[0.4]]], variances=[0.1, 0.2])
    for cell in table.cells():
        if cell.impossible or cell.predictor or table.column != "nfe":
            continue
        ends = {"sigma_min": 0.002, "sigma_max": 80.0, "num_steps": cell.num_steps}
        schedule = {"name": "polynomial"} if cell.schedule["name"] == "gits" else cell.schedule
        plan = Plan(model, make_solver(**(cell.solver or {"name": "euler"})), make_schedule(**{**ends, **schedule}))
        model.data_shape = (1, 1)
        assert count_nfe(plan) == cell.column, cell
    # What a paper measured can be measured.
    assert all(cell.published is None for cell in table.cells() if cell.impossible and cell.row != UNGUIDED)
    assert len({cell.slug for cell in table.cells()}) == len(table.cells())


UNGUIDED = "Progressive distillation (unguided)"


def test_files_that_are_not_there_say_how_to_get_them():
    for name in TABLES:
        for cell in load(name).cells():
            assert all(need.get and "does not say" not in need.get and "{" not in need.path for need in cell.needs), (
                cell
            )
    amed = {cell.column: cell for cell in load("amed_cifar10").cells() if cell.row == "AMED-Plugin"}[5]
    assert amed.needs[1].path == "runs/zhou2024/plugin_cifar10_5nfe/predictor.safetensors"
    assert "experiment=zhou2024/plugin_cifar10 num_steps=3 out=runs/zhou2024/plugin_cifar10_5nfe" in amed.needs[1].get
    student = load("guided_distillation_imagenet64").cells()[1]
    assert student.model == "runs/meng2023/imagenet64_stage2/stages/002/model.safetensors" and student.w == 0


def config(**changes):
    table = {
        "title": "t",
        "column": "nfe",
        "columns": [3, 4],
        "rows": [{"name": "Heun", "model": "m.pkl", "solver": {"name": "heun"}, "published": [None, 1.5]}],
        "reference": {"data": {"name": "digits"}},
    }
    return {**table, **changes}


def test_a_solver_of_two_stages_has_no_odd_columns():
    odd, even = Table.from_dict("t", config()).cells()
    assert "2 evaluations a step" in odd.impossible and even.num_steps == 2 and even.published == 1.5
    afs = [{"name": "Heun", "model": "m.pkl", "solver": {"name": "heun", "afs": True}}]
    odd, even = Table.from_dict("t", config(rows=afs)).cells()
    assert odd.num_steps == 2 and even.impossible


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"colums": [3]}, TypeError, "a table has no entry 'colums': it takes name, title"),
        ({"rows": [{"name": "x", "sover": {}}]}, TypeError, "a row has no entry 'sover': it takes name, model"),
        ({"rows": [{"model": "x"}]}, TypeError, "a row needs an entry 'name'"),
        ({"rows": []}, ValueError, "must not be empty"),
        ({"measures": ["fit"]}, ValueError, "unknown measure 'fit': choose one of accuracy"),
        ({"features": "vgg"}, ValueError, "unknown feature extractor 'vgg'"),
        ({"column": "steps"}, ValueError, "unknown column 'steps': choose one of nfe, num_steps, w"),
        ({"reference": {"path": "x"}}, ValueError, "reference is data: OPTIONS or file: PATH"),
        ({"rows": [{"name": "x", "solver": {"name": "hen"}, "model": "m"}]}, ValueError, "unknown solver 'hen'"),
        ({"rows": [{"name": "x"}]}, ValueError, "row 'x' names no model, and the table has none"),
        ({"columns": [4]}, ValueError, "row 'Heun' has 2 published values for 1 columns"),
        (
            {"columns": ["a", 5]},
            ValueError,
            "columns must be a list, and each of it a finite number",
        ),
        ({"columns": 5}, TypeError, "columns is a list, not 5"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be an integer of at least 1, but is 2.5"),
        ({"num_samples": 3}, ValueError, "splits=5 is more than num_samples=3"),
        (
            {"rows": [{"name": "x", "model": "m", "num_steps": 0}]},
            ValueError,
            "num_steps must be an integer of at least 1",
        ),
        ({"rows": [7]}, TypeError, "is a mapping such as .* not 7"),
        ({"rows": [{"name": "a b", "model": "m"}, {"name": "A-B", "model": "m"}]}, ValueError, "rename 'A-B'"),
    ],
)
def test_bad_configs(changes, error, message):
    with pytest.raises(error, match=message):
        Table.from_dict("t", config(**changes))


def test_a_table_names_the_command_that_makes_it():
    assert Table.from_dict("t", config()).made_by == "diffdistill reproduce table=t"
    assert Table.from_dict("t", config(command="make t")).made_by == "make t"


def test_the_digest_follows_settings_and_files():
    table, other = Table.from_dict("t", config()), Table.from_dict("t", config(num_samples=7))
    cell = table.cells()[1]
    digests = [
        table.digest(cell, {"m.pkl": "1"}),
        table.digest(cell, {"m.pkl": "2"}),
        other.digest(cell, {"m.pkl": "1"}),
    ]
    assert len(set(digests)) == 3
    assert table.digest(cell, {"m.pkl": "1"}) == digests[0]
