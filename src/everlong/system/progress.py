"""Progress with rate and time left: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
"""Nothing is shown before this many seconds, so that short work stays silent."""

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Reports work of known size, as a context manager.

    Args:
        name: what is being done.
        total: its size.
        unit: what the size counts.
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
        """Adds to what is done."""
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
        """Amount, rate and time left in one plain line."""
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
