"""What one sees, and that nobody looking ends no run."""

import io
import os
import pty
import select

from moe_train.train.console import RunConsole, StepLine

LINE = StepLine(5, 10, 1.25, 1e-3, 0.5, 1234.0, 61.0, 0.25)


def test_plain_lines_when_due() -> None:
    stream = io.StringIO()
    console = RunConsole(stream)
    with console.progress(0, 10):
        console.step(LINE, is_due=True)
        console.step(LINE, is_due=False)
    text = stream.getvalue()
    assert text.count("\n") == 1
    for part in ("step      5/10", "1.2500", "1,234 tok/s", "ETA 0:01:01", "MaxVio 0.25"):
        assert part in text


def test_other_ranks_say_nothing() -> None:
    console = RunConsole(None)
    with console.progress(0, 10):
        console.step(LINE, is_due=True)
    console.say("x")


def test_a_closed_output_does_not_end_the_run(capfd) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", buffering=1)
    os.close(reader)
    console = RunConsole(stream)
    for _ in range(3):
        console.say("nobody reads this")
        console.step(LINE, is_due=True)
    assert capfd.readouterr().out.count("standard output is closed") == 1


def test_a_closed_terminal_does_not_end_the_run(capfd, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    console = RunConsole(os.fdopen(follower, "w", buffering=1))
    with console.progress(0, 10):
        console.step(LINE, is_due=True)
        os.close(leader)
        for _ in range(3):
            console.step(LINE, is_due=False)
            console.say("nobody reads this")
    console.say("nor this")
    assert "standard output is closed" in capfd.readouterr().out


def test_the_bar_moves_between_figures_but_not_too_often(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    console = RunConsole(os.fdopen(follower, "w", buffering=1))
    now = [100.0]
    monkeypatch.setattr("moe_train.train.console.time.monotonic", lambda: now[0])
    with console.progress(0, 10):
        for step, seconds in ((3, 1.0), (4, 0.1), (6, 0.6)):
            now[0] += seconds
            console.tick(step)
        console.step(LINE, is_due=False)
        text = ""
        while select.select([leader], [], [], 1.0)[0]:
            text += os.read(leader, 65536).decode()
    for shown in (" 3/10", " 6/10", " 5/10"):
        assert shown in text
    assert " 4/10" not in text
    os.close(leader)
    RunConsole(io.StringIO()).tick(1)  # without a terminal there is no bar


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    leader, follower = pty.openpty()
    console = RunConsole(os.fdopen(follower, "w", buffering=1))
    with console.progress(0, 10):
        console.tick(1)
        console.step(LINE, is_due=True)
    text = os.read(leader, 65536).decode()
    assert "loss" in text
    assert "/10" in text
    assert "\x1b" not in text
    os.close(leader)
