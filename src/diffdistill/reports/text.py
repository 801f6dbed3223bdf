"""Results as text: numbers, Markdown tables and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def markdown_table(lines: Sequence[Sequence[str]], *, words: Collection[str] | None = None) -> str:
    """Lines of cells, the first being the head, as a Markdown table.

    `words` are the columns of text, by default the first one.
    """
    head, *body = lines
    left = head[:1] if words is None else words
    rule = ["---" if name in left else "---:" for name in head]
    written = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in written) + "\n"


def csv_text(fields: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    """Records as CSV, with all digits; what a record lacks, or has as None, is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
