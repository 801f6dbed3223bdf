"""A table of results as one HTML page: it holds its pictures, needs no network and no script, and opens from disk."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffdistill.files.atomic import write_text
from diffdistill.metrics.measures import MEASURES
from diffdistill.tables import pages
from diffdistill.tables.charts import plot, show_samples
from diffdistill.tables.reproduction import Outcome
from diffdistill.tables.tables import COLUMNS, Cell

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th { font-weight: 600; white-space: nowrap; } td b { font-weight: 600; }
td small { display: block; color: var(--quiet); white-space: nowrap; }
td.best { background: var(--soft); }
img { max-width: 100%; } img.grid { image-rendering: pixelated; width: 13rem; max-width: none; }
img.plot { background: white; border-radius: 4px; }
.quiet { color: var(--quiet); } .missing { color: #b45309; }
code { font-size: .9em; }
"""


def write_pages(outcome: Outcome) -> list[Path]:
    """Write `table.md`, `table.csv`, `plot.png`, `samples.png` and `index.html` beside the cells. Return them."""
    folder = outcome.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", pages.markdown(outcome))
    write_text(folder / "table.csv", pages.as_csv(outcome))
    plot(outcome, folder / "plot.png")
    show_samples(outcome, folder / "samples.png")
    write_text(folder / "index.html", page(outcome))
    names = ("table.md", "table.csv", "plot.png", "samples.png", "index.html")
    return [folder / name for name in names if (folder / name).exists()]


def page(outcome: Outcome) -> str:
    """The page; pictures are read from the table's folder and become part of it."""
    table = outcome.table
    waiting = [f'<p class="missing">{escape(text)}</p>' for text in pages.status(outcome)[1:]]
    body = [
        f"<h1>{escape(table.title)}</h1>",
        f"<p>{escape(table.about)}</p>" if table.about else "",
        f"<p>{escape(pages.status(outcome)[0])}</p>",
        *waiting,
        *(_measure(outcome, name) for name in table.measures),
        f'<p class="quiet">{escape(pages.explanation(outcome))}</p>',
        _notes(outcome),
        _picture(outcome.folder / "plot.png", "plot", f"{table.title}, plotted"),
        _grids(outcome),
        _cost(outcome),
        *(
            f'<p class="quiet">Published values of {escape(", ".join(rows))}: {escape(source)}.</p>'
            for source, rows in pages.sources(outcome).items()
        ),
        *(f'<p class="quiet">Measured on {escape(text)}.</p>' for text in pages.made_on(outcome)),
        f"<p class='quiet'>Made by <code>{escape(table.made_by)}</code>.</p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(table.title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        "<body>\n" + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells that are HTML already, the first one being the head."""
    head = "".join(f"<th>{cell}</th>" for cell in lines[0])
    rows = "\n".join("<tr>" + "".join(_cell(cell) for cell in line) + "</tr>" for line in lines[1:])
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _heads(outcome: Outcome) -> list[str]:
    table = outcome.table
    return [escape(COLUMNS[table.column]), *(f"{column:g}" for column in table.columns)]


def _measure(outcome: Outcome, name: str) -> str:
    """Measured values with published ones and differences below; the best of each column is shaded."""
    table, better = outcome.table, MEASURES[name].better
    best = {}
    for cell in table.cells():
        result = outcome.result(cell)
        if result is not None and name in result.measures:
            best.setdefault(cell.column, []).append(result.measures[name].value)
    pick = min if better == "lower" else max
    lines = [_heads(outcome)]
    for row in table.rows:
        texts = [
            _value(outcome, cell, name, pick(best[cell.column]) if cell.column in best else None)
            for cell in pages.row_cells(outcome, row)
        ]
        lines.append([escape(row.name), *texts])
    return f"<h2>{escape(pages.heading(outcome, name))}</h2>\n{_table(lines)}"


def _value(outcome: Outcome, cell: Cell, name: str, best: float | None) -> str:
    result = outcome.result(cell)
    found = None if result is None else result.measures.get(name)
    published = cell.published if name == outcome.table.measures[0] else None
    if cell.impossible and published is None:
        return '<td class="quiet">-</td>'
    parts = [] if found is None else [f"<b>{escape(str(found))}</b>"]
    if published is not None:
        parts.append(f'<small title="{escape(cell.source or "", quote=True)}">published {published:g}</small>')
        if found is not None:
            parts.append(f"<small>difference {found.value - published:+.2f}</small>")
    shaded = found is not None and found.value == best
    return f"<td{' class=best' if shaded else ''}>{''.join(parts)}</td>"


def _notes(outcome: Outcome) -> str:
    notes = [f"<li>{escape(row.name)}: {escape(row.note)}</li>" for row in outcome.table.rows if row.note]
    return f'<ul class="quiet">{"".join(notes)}</ul>' if notes else ""


def _grids(outcome: Outcome) -> str:
    """Samples of every cell, the same seeds in each."""
    lines = [_heads(outcome)]
    for row in outcome.table.rows:
        cells = pages.row_cells(outcome, row)
        pictures = [
            _picture(
                outcome.folder / "cells" / f"{cell.slug}.png",
                "grid",
                f"samples of {row.name}, {outcome.table.column} {cell.column:g}",
            )
            if outcome.result(cell) is not None
            else ""
            for cell in cells
        ]
        if any(pictures):
            lines.append([escape(row.name), *pictures])
    return f"<h2>Samples</h2>\n<p>The same seeds in every cell.</p>\n{_table(lines)}" if len(lines) > 1 else ""


def _cost(outcome: Outcome) -> str:
    if not outcome.results:
        return ""
    lines = [[escape(text) for text in line] for line in pages.cost_lines(outcome)]
    lines[0] = [*_heads(outcome), "learned"]
    return f"<h2>Cost of one image</h2>\n{_table(lines)}\n<p class='quiet'>{pages.COST_NOTE}</p>"


def _picture(path: Path, kind: str, text: str) -> str:
    """A PNG file as part of the page."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="{kind}" alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'
