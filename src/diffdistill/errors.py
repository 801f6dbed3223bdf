"""Errors of libraries, told in one line."""

from __future__ import annotations


def one_line(error: BaseException, *, limit: int = 300) -> str:
    """The first line of an error's message, or all of it where that ends in a colon; the error's type if it has none.

    At most `limit` characters.
    """
    first, _, rest = str(error).strip().partition("\n")
    text = " ".join([first, *rest.split()]) if first.endswith(":") else first
    return text[:limit] or type(error).__name__
