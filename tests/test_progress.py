"""Progress where there is a terminal, a notebook or neither."""

import io
import logging
import sys
import types

import pytest

from diffdistill.reports import progress as room
from diffdistill.reports.progress import progress


class ZMQInteractiveShell:
    """What IPython calls the shell of a kernel."""


def test_a_notebook_shows_a_bar(monkeypatch):
    shell = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress(range(3), desc="steps")) == [0, 1, 2]
    assert "steps: 100%" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 2), (30.0, 0)])
def test_a_log_gets_lines_now_and_then(seconds, lines, monkeypatch, caplog):
    monkeypatch.setattr(room, "SECONDS", seconds)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        assert list(progress(range(3), desc="steps", unit="batch", miniters=1)) == [0, 1, 2]
    assert not sys.stderr.getvalue()
    assert len(caplog.messages) == lines
    assert all(message.startswith(f"steps: {n} of 3 batch, ") for n, message in enumerate(caplog.messages, start=1))


def test_what_is_hidden_shows_nothing(monkeypatch, caplog):
    monkeypatch.setattr(room, "SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(progress(range(3), hidden=True)) == [0, 1, 2]
    assert not caplog.messages
