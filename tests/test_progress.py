"""Progress: silent at first, then plain lines where there is no terminal and a bar on one."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from everlong import progress as module
from everlong.progress import LINE_SECONDS, Progress


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_plain_lines_with_rate_and_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="everlong")
    with Progress("epoch 1", 1_000, "events") as progress:
        clock.now += 1
        progress.advance(100)
        assert not caplog.records
        clock.now += LINE_SECONDS
        progress.advance(210)
    (record,) = caplog.records
    assert record.getMessage() == "epoch 1: 310 of 1,000 events, 10 events/s, 69 s left"


def test_a_bar_on_a_terminal(clock: Clock) -> None:
    screen = io.StringIO()
    with Progress("epoch 1", 1_000, "events") as progress:
        progress._console = Console(file=screen, force_terminal=True, width=100)
        clock.now += 10
        progress.advance(500)
    assert "epoch 1" in screen.getvalue()
    assert "500/1000" in screen.getvalue()
