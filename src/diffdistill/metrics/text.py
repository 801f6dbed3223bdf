"""Results in words: numbers, measures with their spread, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from diffdistill.metrics.measures import Measured


def number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def measured(found: Measured) -> str:
    """A measure with its spread."""
    spread = "" if found.part_std is None else f" ± {number(found.part_std, 2)}"
    return number(found.value) + spread


def grid_of(lines: Sequence[Sequence[str]], *, words: Collection[str] | None = None) -> str:
    """Lines of cells, the first being the head, as a Markdown table.

    `words` are the columns of text, by default the first one.
    """
    head, *body = lines
    left = head[:1] if words is None else words
    rule = ["---" if name in left else "---:" for name in head]
    written = [[cell.replace("|", "\\|") for cell in line] for line in (head, rule, *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in written) + "\n"
