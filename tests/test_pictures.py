import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.reports import plots
from diffdistill.reports.pictures import GAP, save_grid
from diffdistill.reports.plots import Line, Panel, name_lines, plot_curves, plot_panels, save_figure


def test_a_grid_places_images_row_by_row(tmp_path):
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 2.0])
    images = levels.view(5, 1, 1, 1).expand(5, 3, 4, 6)
    save_grid(images, tmp_path / "grid.png", columns=3, scale=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 8 + GAP, 3 * 12 + 2 * GAP, 3)
    centres = [pixels[4 + r * (8 + GAP), 6 + c * (12 + GAP), 0] for r in range(2) for c in range(3)]
    assert centres == [0, 64, 128, 191, 255, 255]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_captions_get_a_margin(tmp_path):
    images = torch.zeros(6, 1, 8, 8)
    save_grid(images, tmp_path / "plain.png", columns=3)
    save_grid(images, tmp_path / "named.png", columns=3, row_captions=["w = 0", "w = 1"], column_captions="abc")
    plain, named = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")) for n in ("plain", "named"))
    margin = [b - a for a, b in zip(plain.shape, named.shape, strict=True)]
    assert margin[0] > 0 and margin[1] > 0
    assert np.array_equal(named[margin[0] :, margin[1] :], plain)
    assert (named[: margin[0]] < 128).any() and (named[margin[0] :, : margin[1]] < 128).any()


def test_a_grid_refuses_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"not \[2, 4, 8, 8\]"):
        save_grid(torch.zeros(2, 4, 8, 8), tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn_of_what_there_is(tmp_path):
    plot_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    records = [{"update": k, "loss": 1 / k, "drift": k - 3.0, "seconds": k} for k in range(1, 9)]
    plot_curves([*records, {"update": 9, "loss": 0.1}], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_lines_are_named_at_their_ends_where_names_do_not_meet(tmp_path):
    ends = {"a": 0.0, "b": 0.01, "c": 0.02, "d": 0.5, "e": 1.0}
    found = {}

    def draw(figure):
        axes = figure.add_subplot()
        for name, end in ends.items():
            axes.plot([0, 1], [0.3, end], label=name)
        axes.plot([0, 1], [0, 1])
        name_lines(axes, size=12)
        found.update({text.get_text(): text.xyann[1] for text in axes.texts})

    save_figure(draw, tmp_path / "lines.png", size=(3, 2))
    step = 1.5 * 12 / (2 * 72)
    assert list(found) == list("abcde"), "from below, without the line that has no name"
    places = np.array([*found.values()])
    assert (np.diff(places) > step - 1e-9).all() and places[0] > -1e-9 and places[-1] < 1 + 1e-9
    margin = 0.05 / 1.1  # of the axis around the data
    assert found["d"] == pytest.approx(0.5) and found["e"] == pytest.approx(1 - margin), (
        "these have room where they are"
    )
    assert np.diff(places[:3]) == pytest.approx([step, step]), "these share theirs"


@pytest.mark.parametrize(("low", "high", "some"), [(0.55, 0.68, {"0.6", "0.64"}), (3, 11, {"4", "10"})])
def test_narrow_logarithmic_axes_show_plain_numbers(tmp_path, low, high, some):
    kept = []

    def draw(figure):
        axes = figure.add_subplot(yscale="log")
        axes.plot([0, 1], [low, high])
        kept.append(axes.yaxis)

    save_figure(draw, tmp_path / "log.png", size=(4, 3))
    (axis,) = kept
    texts = {label.get_text() for minor in (False, True) for label in axis.get_ticklabels(minor=minor)} - {""}
    assert some <= texts and all(float(text) > 0 for text in texts)


def test_panels_with_a_common_axis_show_all_their_lines(tmp_path, monkeypatch):
    ends = {}

    def name_and_look(axes):
        name_lines(axes)
        ends[axes.get_title()] = axes.get_ylim()

    monkeypatch.setattr(plots, "name_lines", name_and_look)
    panels = [
        Panel([Line("a", [(3, 0.5), (5, 2.0)])], "evaluations", title="high", yscale="log"),
        Panel([Line("b", [(3, 0.3), (5, 0.01)], bold=True)], "evaluations", title="low", xticks=[3, 5], yscale="log"),
    ]
    plot_panels(panels, tmp_path / "panels.png", size=(6, 3), share_y=True)
    assert ends["high"] == ends["low"]
    assert ends["low"][0] < 0.01 and ends["low"][1] > 2.0
