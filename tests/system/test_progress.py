import io
import logging
import time

import pytest
from rich.console import Console

from everlong.system import progress as module
from everlong.system.progress import LINE_SECONDS, QUIET_SECONDS, Progress


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    output = io.StringIO()
    monkeypatch.setattr(
        module,
        "Console",
        lambda stderr: Console(file=output, force_terminal=terminal, width=100, stderr=stderr),
    )
    return output


def test_short_tasks_are_silent(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for terminal in (True, False):
        output = console(monkeypatch, terminal)
        with caplog.at_level(logging.INFO), Progress("work", 10, "events") as progress:
            for _ in range(10):
                clock.now += QUIET_SECONDS / 20
                progress.advance(1)
        assert output.getvalue() == ""
    assert caplog.messages == []


def test_log_lines_without_a_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = console(monkeypatch, terminal=False)
    with caplog.at_level(logging.INFO), Progress("epoch 1", 12_000, "events") as progress:
        for _ in range(9):
            clock.now += LINE_SECONDS / 3
            progress.advance(1000)
    assert output.getvalue() == ""
    assert caplog.messages == [
        "epoch 1: 3,000 of 12,000 events, 100 events/s, 90 s left",
        "epoch 1: 6,000 of 12,000 events, 100 events/s, 60 s left",
        "epoch 1: 9,000 of 12,000 events, 100 events/s, 30 s left",
    ]


def test_a_bar_on_a_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = console(monkeypatch, terminal=True)
    with caplog.at_level(logging.INFO), Progress("epoch 1", 300, "events") as progress:
        for _ in range(3):
            clock.now += 10.0
            progress.advance(100)
    shown = output.getvalue()
    assert "epoch 1" in shown
    assert "300/300" in shown
    assert "10 events/s" in shown
    assert caplog.messages == []


def test_an_error_removes_the_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    output = console(monkeypatch, terminal=True)
    with pytest.raises(ValueError, match="broken"), Progress("work", 3, "users") as progress:  # noqa: PT012
        clock.now += 10.0
        progress.advance(1)
        raise ValueError("broken")
    # the cursor, hidden while a bar moves, is shown again
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")


def test_a_line_without_completed_work(clock: Clock) -> None:
    with Progress("work", 5, "users") as progress:
        assert progress.line(clock.now).startswith("work: 0 of 5 users, 0 users/s")
