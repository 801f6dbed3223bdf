"""A whole table on a tiny model: results, pages, continuing, and what is missing."""

import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import load_data
from diffdistill.metrics import frechet_distance, gaussian_of, make_features
from diffdistill.models import Autoencoder, build_denoiser, load_denoiser, save_denoiser
from diffdistill.sampling.generation import generate
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import spread_labels
from diffdistill.solvers import load_gaussian, save_gaussian
from diffdistill.tables.comparison import side_by_side
from diffdistill.tables.html import page, write_pages
from diffdistill.tables.pages import markdown
from diffdistill.tables.planning import dry_run
from diffdistill.tables.reproduction import Files, Outcome, known_results, missing_files, reproduce
from diffdistill.tables.tables import Table
from tests.builders import tiny_denoiser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "teacher.safetensors"
    provenance = {"command": "train", "metrics": {"update": 7, "seconds": 12.5}}
    save_denoiser(tiny_denoiser(data_shape=[1, 8, 8], num_classes=10), path, provenance=provenance)
    return str(path)


def table(model, **changes):
    rows = [
        {"name": "Euler <b>", "solver": {"name": "euler"}, "published": [12.5, 9.25]},
        {"name": "Heun", "solver": {"name": "heun"}},
        {"name": "Guided", "model": model, "num_steps": 2, "w": 1.5, "only": []},
        {"name": "Elsewhere", "model": "nowhere/{nfe}.pkl", "published": [3.0, None], "get": "ask for {nfe}"},
    ]
    settings = {
        "title": "A tiny table",
        "column": "nfe",
        "columns": [2, 3],
        "model": model,
        "schedule": {"name": "polynomial"},
        "reference": {"data": {"name": "digits", "split": "test"}},
        "features": "digits_classifier",
        "measures": ["fid", "accuracy", "kid"],
        "num_samples": 140,
        "splits": 2,
        "source": "nobody",
        "rows": rows,
    }
    return Table.from_dict("tiny", {**settings, **changes})


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    outcome = reproduce(table(model), folder, device=CPU, batch_size=50, save_samples=True)
    write_pages(outcome)
    return outcome


def test_a_cell_is_what_sampling_and_measuring_by_hand_give(model, done):
    planned = plan(load_denoiser(model), schedule={"name": "polynomial"}, num_steps=3)
    x = torch.cat(list(generate(planned, range(140), torch.arange(140) % 10, batch_size=70))).clamp(-1, 1)
    features = make_features("digits_classifier")
    reference = gaussian_of(features, load_data("digits", split="test").tensors()["x"])
    result = done.results["euler-b__3"]
    assert result.measures["fid"].value == pytest.approx(
        frechet_distance(gaussian_of(features, x), reference), rel=1e-5
    )
    halves = [frechet_distance(gaussian_of(features, part), reference) for part in x.split(70)]
    assert result.measures["fid"].part_mean == pytest.approx(np.mean(halves), rel=1e-4)
    assert result.measures["fid"].part_std == pytest.approx(np.std(halves, ddof=1), rel=1e-3)
    assert (result.nfe, result.num_steps, result.num_samples) == (3, 3, 140)
    assert result.seconds_per_image > 0 and result.versions["torch"] == torch.__version__
    assert result.training == {model: {"command": "train", "updates": 7, "seconds": 12.5}}
    with np.load(done.folder / "cells/euler-b__3/samples.npz") as file:
        np.testing.assert_allclose(file["x"], x, atol=1e-5)
    assert Image.open(done.folder / "cells/euler-b__3.png").size[0] == 10 * (16 + 2) - 2


def test_switches_are_those_of_the_denoiser_and_change_nothing(model, done, tmp_path, monkeypatch):
    given = []

    def accelerated(denoiser, **switches):
        given.append(switches)
        return denoiser

    monkeypatch.setattr("diffdistill.tables.cells.accelerated", accelerated)
    outcome = reproduce(table(model), tmp_path, device=CPU, batch_size=50, switches={"compile": True})
    assert given == [{"compile": True}] * 3
    for slug, result in done.results.items():
        assert outcome.results[slug].measures["fid"].value == pytest.approx(result.measures["fid"].value, rel=1e-6)


def test_only_what_can_be_measured_is(done):
    assert sorted(done.results) == ["euler-b__2", "euler-b__3", "heun__2"]
    assert [(need.path, need.get) for need in done.missing] == [
        ("nowhere/2.pkl", "ask for 2"),
        ("nowhere/3.pkl", "ask for 3"),
    ]


def test_guidance_counts_twice_and_w_0_guides_nothing(model, tmp_path):
    rows = [{"name": "Guided", "model": model, "num_steps": 2}]
    settings = {"column": "w", "columns": [0, 1.5], "rows": rows, "measures": ["accuracy"], "splits": 1}
    results = reproduce(table(model, **settings), tmp_path, device=CPU).results
    assert [results[slug].nfe for slug in ("guided__0", "guided__1.5")] == [2, 4]
    assert results["guided__0"].measures["accuracy"].part_std is None


def test_the_samples_of_a_latent_model_are_measured_as_images(tmp_path):
    config = tiny_denoiser(num_classes=10).config
    inner = Autoencoder(data_shape=[3, 16, 16], latent_channels=2, channels=[8])
    save_denoiser(build_denoiser({**config, "provenance": None}, autoencoder=inner), tmp_path / "m.safetensors")
    settings = {
        "features": "pixels_8x8",
        "measures": ["fid"],
        "reference": {"data": {"name": "shapes", "size": 30, "resolution": 16}},
        "rows": [{"name": "Euler", "solver": {"name": "euler"}}],
        "columns": [2],
        "num_samples": 20,
    }
    with pytest.warns(UserWarning, match="take at least 193"):
        results = reproduce(table(str(tmp_path / "m.safetensors"), **settings), tmp_path, device=CPU).results
    assert results["euler__2"].measures["fid"].value > 0
    assert Image.open(tmp_path / "cells/euler__2.png").mode == "RGB"


def test_gits_counts_the_evaluations_of_its_choice(model, tmp_path):
    rows = [{"name": "GITS", "solver": {"name": "ipndm"}, "schedule": {"name": "gits", "fine_steps": 5}}]
    result = reproduce(table(model, rows=rows, columns=[2]), tmp_path, device=CPU).results["gits__2"]
    assert (result.preparation_nfe, result.nfe) == (256 * 5, 2)


def test_a_start_needs_statistics_and_counts_no_evaluation(model, tmp_path):
    mine = tmp_path / "m.safetensors"
    shutil.copy(model, mine)
    rows = [
        {"name": "Start", "solver": {"name": "ipndm"}, "start": 3.5},
        {"name": "GITS", "solver": {"name": "ipndm"}, "start": 3.5, "schedule": {"name": "gits", "fine_steps": 5}},
        {"name": "Named", "solver": {"name": "ipndm"}, "start": {"sigma": 3.5, "statistics": "digits-teacher"}},
        {"name": "Plain", "solver": {"name": "ipndm"}},
    ]
    small = {"columns": [2], "num_samples": 20, "measures": ["accuracy"], "rows": rows}
    outcome = reproduce(table(str(mine), **small), tmp_path / "t", device=CPU)
    assert sorted(outcome.results) == ["named__2", "plain__2"]
    assert {need.path for need in outcome.missing} == {str(tmp_path / "m.statistics.safetensors")}
    assert outcome.missing[0].get == f"diffdistill gaussian-stats model={mine} beside=true"
    save_gaussian(load_gaussian("digits-teacher"), tmp_path / "m.statistics.safetensors")
    text = dry_run(table(str(mine), **small), tmp_path / "t", device=CPU)
    assert "to do    GITS, nfe 2: 2 evaluations an image" in text and "done     Named" in text
    results = reproduce(table(str(mine), **small), tmp_path / "t", device=CPU).results
    assert [r.nfe for r in results.values()] == [2] * 4 and results["gits__2"].preparation_nfe == 256 * 5
    assert results["start__2"].measures == results["named__2"].measures
    assert json.loads((tmp_path / "t/cells/start__2.json").read_text())["digest"] != results["plain__2"].digest


def test_a_finished_cell_is_not_measured_again_and_a_changed_one_is(model, done, tmp_path):
    shutil.copytree(done.folder, tmp_path / "t")
    cells = tmp_path / "t/cells"
    written = {path.name: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    (cells / "heun__2.json").write_text('{"row": "Heun"')  # cut off
    outcome = reproduce(table(model), tmp_path / "t", device=CPU, batch_size=50)
    assert {n: t for n, t in written.items() if cells.joinpath(n).stat().st_mtime_ns != t}.keys() == {"heun__2.json"}
    assert outcome.results["heun__2"].measures["fid"].value == pytest.approx(
        done.results["heun__2"].measures["fid"].value
    )
    fewer = reproduce(table(model, num_samples=40, measures=["accuracy"]), tmp_path / "t", device=CPU)
    assert {result.num_samples for result in fewer.results.values()} == {40}
    known, _ = known_results(table(model), tmp_path / "t", Files(tmp_path / "t/files.json"))
    assert not known and "done" not in dry_run(table(model), tmp_path / "t", device=CPU)


def test_a_file_that_changed_is_refused(model, tmp_path):
    mine = tmp_path / "m.safetensors"
    shutil.copy(model, mine)
    small = {
        "rows": [{"name": "Euler", "solver": {"name": "euler"}}],
        "columns": [2],
        "num_samples": 20,
        "measures": ["accuracy"],
    }
    reproduce(table(str(mine), **small), tmp_path / "t", device=CPU)
    assert len(json.loads((tmp_path / "t/files.json").read_text())[str(mine)]) == 64
    save_denoiser(tiny_denoiser(seed=1, data_shape=[1, 8, 8], num_classes=10), mine)
    with pytest.raises(ValueError, match=r"m.safetensors has SHA-256 .* but .*files.json says .* it is another file"):
        reproduce(table(str(mine), **small), tmp_path / "t", device=CPU)
    stated = table(str(mine), **small, files={str(mine): {"url": "u", "sha256": "0" * 64}})
    with pytest.raises(ValueError, match="but the config says 0000"):
        reproduce(stated, tmp_path / "other", device=CPU)


def test_a_dry_run_names_cells_files_and_cost(model, tmp_path):
    text = dry_run(table(model), tmp_path / "none", device=CPU)
    assert "missing  Elsewhere, nfe 2: nowhere/2.pkl" in text and "by hand: nowhere/2.pkl: ask for 2" in text
    assert "to do    Euler <b>, nfe 3: 3 evaluations an image, about" in text
    assert "none     Heun, nfe 3: heun takes 2 evaluations a step" in text
    assert f"{140 * (2 + 3 + 2 + 2 + 3):,} network evaluations to do" in text and "2 cells wait for files" in text
    assert not (tmp_path / "none").exists()


def test_a_dry_run_refuses_what_the_run_would(model, tmp_path):
    guided = table(model, rows=[{"name": "Guided", "solver": {"name": "euler"}, "w": 1.5}])
    for run in (dry_run, reproduce):
        with pytest.raises(ValueError, match="'Guided': a run of 2 steps takes 4 evaluations, not the 2 of its column"):
            run(guided, tmp_path / "t", device=CPU)


def test_a_published_value_leaves_what_cannot_be_measured_a_dash_in_other_measures(model, tmp_path):
    rows = [{"name": "Theirs", "run": False, "published": [4.0, None]}]
    outcome = Outcome(table(model, rows=rows), tmp_path, {})
    text, html = markdown(outcome), page(outcome)
    assert text.count("| Theirs | (4) | - |") == 1 and text.count("| Theirs | - | - |") == 2
    assert html.count("published 4<") == 1 and html.count('<td class="quiet">-</td>') == 5


def test_markdown_and_csv(done):
    text = (done.folder / "table.md").read_text()
    fid = done.results["euler-b__2"].measures["fid"].value
    assert (
        f"(12.5, {fid - 12.5:+.2f})" in text
        and "(3)" in text
        and "3 of 5 cells are measured, 140 samples each." in text
    )
    assert "Missing: nowhere/2.pkl: ask for 2." in text and "Published values of Euler <b>, Elsewhere: nobody." in text
    rows = list(csv.DictReader((done.folder / "table.csv").open()))
    assert len(rows) == 3 * 3 + 1
    first = next(r for r in rows if r["row"] == "Euler <b>" and r["value_of_column"] == "2" and r["measure"] == "fid")
    assert float(first["value"]) == fid and float(first["difference"]) == pytest.approx(fid - 12.5)
    assert first["nfe"] == "2" and first["source"] == "nobody"


def test_samples_of_the_same_seeds_stand_below_each_other(done):
    sheet = np.asarray(Image.open(done.folder / "samples.png"))
    strips = []
    for slug in ("euler-b__2", "euler-b__3", "heun__2"):
        grid = np.asarray(Image.open(done.folder / "cells" / f"{slug}.png").convert("RGB"))
        assert grid.shape == (4 * 18 - 2, 10 * 18 - 2, 3)
        strips.append(grid[:16].repeat(2, axis=0).repeat(2, axis=1))
    height, width = strips[0].shape[:2]
    top, left = sheet.shape[0] - 2 * height - 2, sheet.shape[1] - 2 * width - 12
    assert top > 0 and left > 0
    places = [(top, left), (top, left + width + 12), (top + height + 2, left)]
    for strip, (y, x) in zip(strips, places, strict=True):
        assert np.array_equal(sheet[y : y + height, x : x + width], strip)
    assert (sheet[top + height + 2 :, left + width :] == 255).all()  # Heun takes no 3 evaluations


class Page(HTMLParser):
    """Tags that stay open, and attributes that could load something."""

    VOID = ("meta", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.pictures = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.pictures.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_all_it_shows(done):
    text = (done.folder / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert all(link.startswith("data:") for link in page.links) and "<script" not in text and "url(" not in text
    for picture in page.pictures:
        data = base64.b64decode(picture["src"].partition("base64,")[2])
        assert Image.open(BytesIO(data)).size[0] > 100 and picture["alt"]
    assert [p["class"] for p in page.pictures] == ["plot", "grid", "grid", "grid"]
    assert "Euler &lt;b&gt;" in text and "Euler <b>" not in text
    assert "published 12.5" in text and "published 3" in text and text.count("ask for 2") == 1


def browser():
    names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason="needs chromium")
def test_a_browser_shows_the_page_from_disk_without_a_network(done, tmp_path):
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400", "--hide-scrollbars"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}", f"--screenshot={shot}"]
    page = (done.folder / "index.html").as_uri()
    subprocess.run([browser(), *options, *offline, page], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The plot has lines of the first colour, the grids have grey samples that are neither paper nor ink alone.
    blue = np.abs(pixels - [0x1F, 0x77, 0xB4]).sum(axis=2) < 30
    assert blue.sum() > 100
    seen = (done.folder / "cells/heun__2.png").read_bytes()
    levels = np.unique(np.asarray(Image.open(BytesIO(seen)).convert("L")))
    grey = (pixels.max(axis=2) == pixels.min(axis=2)) & np.isin(pixels[..., 0], levels[(levels > 90) & (levels < 110)])
    assert grey.sum() > 1000


def test_a_table_without_its_files_stays_empty_and_says_so(model, tmp_path):
    alone = table(model, rows=[{"name": "Elsewhere", "model": "nowhere.pkl", "published": [3.0, 2.0], "get": "ask"}])
    outcome = reproduce(alone, tmp_path, device=CPU)
    text = write_pages(outcome)[0].read_text()
    assert "0 of 2 cells are measured" in text and "(3)" in text and "Missing: nowhere.pkl: ask." in text
    assert [need.path for need in missing_files(alone)] == ["nowhere.pkl"]
    assert not re.search(r"<h2>Samples", (tmp_path / "index.html").read_text())


def test_rows_side_by_side_show_the_same_seeds(model, tmp_path):
    rows = [{"name": f"{n} steps", "model": model, "num_steps": n} for n in (2, 3)]
    rows.append({"name": "Absent", "model": "nowhere.pkl", "num_steps": 4})
    outcome = reproduce(
        table(model, column="w", columns=[0, 2], rows=rows, measures=["fid"], num_samples=20), tmp_path, device=CPU
    )
    paths = side_by_side(outcome, tmp_path, CPU, columns=5)
    assert [path.name for path in paths] == ["samples_w0.png", "samples_w2.png"]
    grid = np.asarray(Image.open(paths[1]).convert("L"))
    assert grid.shape[0] == 2 * 34 - 2  # eight pixels of four by four, twice, with a gap: nothing of what is absent
    planned = plan(load_denoiser(model), w=2, schedule={"name": "polynomial"}, num_steps=3)
    (x,) = generate(planned, [4], spread_labels(5, 10)[-1:])
    expected = (x[0, 0].clamp(-1, 1).numpy() + 1) * 127.5
    assert np.abs(grid[34::4, -32::4] - expected).max() < 1
    with pytest.raises(ValueError, match="side_by_side needs a table whose columns are w, not nfe"):
        side_by_side(Outcome(table(model), tmp_path, {}), tmp_path, CPU)
