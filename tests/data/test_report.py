"""What is shown while data is prepared."""

import io
import sys

import pytest

from moe_train.data.report import PreparationReport


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_two_lines_where_there_is_no_terminal(capsys):
    with PreparationReport("corpus", 2_000_000, show_bar=True) as report:
        report.advance(2, 1000, 3000)
        report.advance(1, 500, 1000)
    begin, end = capsys.readouterr().err.splitlines()
    assert begin == "tokenizing corpus: up to 2.0 MB"
    assert end.startswith("tokenized corpus: 3 documents, 1,500 tokens, 4,000 bytes in ")


def test_no_last_line_after_an_error(capsys):
    with pytest.raises(RuntimeError), PreparationReport("corpus", 10, show_bar=False):
        raise RuntimeError
    assert capsys.readouterr().err.splitlines() == ["tokenizing corpus: up to 0.0 MB"]


@pytest.mark.parametrize("show_bar", [True, False])
def test_a_bar_on_a_terminal_if_wanted(monkeypatch, show_bar):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with PreparationReport("corpus", 100, show_bar) as report:
        report.advance(1, 10, 100)
    assert ("\x1b[" in terminal.getvalue()) == show_bar
    assert "tokenized corpus: 1 documents, 10 tokens, 100 bytes in" in terminal.getvalue()
