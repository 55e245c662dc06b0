"""A thread that moves a write-ahead log into its file beside the writer."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Time between two movings of events from the write-ahead log into the file."""

LONG = 32_768
"""Pages of a write-ahead log from which on it is begun anew, for which events wait a moment."""


class WalFlusher:
    """A thread that moves a write-ahead log into its file, a little at a time.

    All at once would keep the disk from the writer for a tenth of a second.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.moving = threading.Lock()
        """Held while something is moved."""
        self.ready = False
        """Whether something was moved since the writer looked."""
        self.pages = 0
        """Pages that the write-ahead log had then."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._flush, name=f"flush {path.name}")
        self._thread.start()

    def close(self) -> None:
        """Stops the thread."""
        self._closing.set()
        self._thread.join()

    def _flush(self) -> None:
        while not self._closing.wait(FLUSH_S):
            try:
                if self._move() >= LONG:
                    # once more, so that next to nothing is left for the writer to move
                    self._move()
            except (sqlite3.Error, OSError) as error:
                log.warning("the write-ahead log cannot be moved: %s", error)

    def _move(self) -> int:
        """Moves what no reader needs; returns how many pages the write-ahead log has."""
        with self.moving, closing(sqlite3.connect(self.path)) as beside:
            _, pages, _ = beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.ready, self.pages = True, int(pages)
        return self.pages
