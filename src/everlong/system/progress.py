"""Progress reports with rate and remaining time: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
"""Seconds without a report, so that short tasks stay silent."""

LINE_SECONDS = 30.0
"""Seconds between two log lines without a terminal."""


class Progress:
    """Reports the progress of a task of known size, as a context manager.

    Args:
        name: the name of the task.
        total: its size.
        unit: the unit of the size.
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._next_line = self._began + LINE_SECONDS
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Adds to the completed amount and reports it when due."""
        self.done += amount
        now = time.monotonic()
        if now - self._began < QUIET_SECONDS:
            return
        if self._console.is_terminal:
            self._show_bar(now)
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            log.info("%s", self.line(now))

    def line(self, now: float) -> str:
        """The completed amount, rate and remaining time as a line of text."""
        rate = self.done / max(now - self._began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        return (
            f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f} {self.unit}/s, {left:,.0f} s left"
        )

    def _show_bar(self, now: float) -> None:
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self.name, total=self.total, rate="")
            self._bar.start()
        rate = self.done / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self.done, rate=f"{rate:,.0f} {self.unit}/s")
