"""The event log of a shard: an SQLite file with one writer, the truth from which all else follows.

An event has an offset, its place in the order of arrival, and an id by which a second delivery is
known. ``append`` returns once the events are on disk (WAL, ``synchronous=FULL``): what it has
returned survives a kill and a power cut. The states of users are kept in the same file as a cache
of the log, so that what is erased is erased together and what is copied fits together.

Every row has a checksum, and their sum is kept beside them, so that a row that was changed, lost or
added by anybody else is found by ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VERSION = 1
PAGE = 8_192
NO_FIELDS: Mapping[str, float | int] = {}

Id = int | str
"""An id of a user or an item, as the client gave it."""

SCHEMA = """
CREATE TABLE events (
    offset INTEGER PRIMARY KEY,
    event_key BLOB NOT NULL UNIQUE,
    user_id NOT NULL,
    item_id NOT NULL,
    time INTEGER NOT NULL,
    fields TEXT NOT NULL,
    checksum BLOB NOT NULL
);
CREATE INDEX events_of_user ON events (user_id, offset, item_id);
CREATE TABLE erased (event_key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE states (
    model TEXT NOT NULL,
    user_id NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (model, user_id)
) WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""


class Event(NamedTuple):
    """Something that a user did."""

    event_id: str
    """Two events with one id are one event, delivered twice."""
    user_id: Id
    item_id: Id
    time: int
    """Unix seconds, or a position where logs have no times."""
    fields: Mapping[str, float | int] = NO_FIELDS


class Receipt(NamedTuple):
    """What became of an event."""

    offset: int
    """Its place in the log; 0 for one that was erased and came again."""
    new: bool


class Stored(NamedTuple):
    """An event of the log."""

    offset: int
    event_key: bytes
    user_id: Id
    item_id: Id
    time: int
    fields: Mapping[str, float | int]


class DamagedError(ValueError):
    """A file is not what was written to it."""


class Total(NamedTuple):
    """What all rows come to: how many, the last offset ever given, and the sum of checksums."""

    events: int = 0
    last: int = 0
    sum: int = 0

    def to_bytes(self) -> bytes:
        packed = struct.pack("<QQQ", *self)
        return packed + _digest(packed)

    @staticmethod
    def from_bytes(data: bytes) -> Total:
        if len(data) != 32 or _digest(data[:24]) != data[24:]:
            raise DamagedError("the totals of the log are damaged: restore the file from a copy")
        return Total(*struct.unpack("<QQQ", data[:24]))


class EventLog:
    """Events of one shard on disk.

    Args:
        path: the file; made where there is none.

    Raises:
        DamagedError: if the file is not a log, or its totals are not what was written.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # the service hands it to the thread of the shard's writer
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{path} cannot be opened: {error}") from error
            raise DamagedError(
                f"{path} is not an event log: {error}; restore it from a copy"
            ) from error

    def _open(self) -> None:
        run = self.connection.execute
        run(f"PRAGMA page_size={PAGE}")
        # what is erased is overwritten, not only let go
        for pragma in ("secure_delete=ON", "journal_mode=WAL", "synchronous=FULL"):
            run(f"PRAGMA {pragma}")
        # moved by ``checkpoint``, between groups of events
        run("PRAGMA wal_autocheckpoint=0")
        if not run("SELECT 1 FROM sqlite_master WHERE name='facts'").fetchone():
            with self.transaction():
                for statement in SCHEMA.split(";"):
                    run(statement)
                self.put_fact("version", str(VERSION).encode())
                self.put_fact("salt", secrets.token_bytes(16))
                self.put_fact("total", Total().to_bytes())
        version = self.fact("version")
        if version != str(VERSION).encode():
            raise DamagedError(
                f"{self.path}: expected a log of version {VERSION}, found {version!r}"
            )
        self._salt = self.fact("salt") or b""
        self.total = Total()
        self.look()

    def look(self) -> Total:
        """The totals as another writer has left them."""
        self.total = Total.from_bytes(self.fact("total") or b"")
        return self.total

    def close(self) -> None:
        """Closes the file; nothing is lost without it."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside reaches the disk together, or none of it does."""
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        try:
            yield
            run("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                run("ROLLBACK")
            raise

    def fact(self, name: str) -> bytes | None:
        """A value by name."""
        row = self.connection.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def put_fact(self, name: str, value: bytes) -> None:
        """Sets a value by name."""
        self.connection.execute(
            "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value=excluded.value",
            (name, value),
        )

    # writing

    def append(self, events: Sequence[Event]) -> list[Receipt]:
        """Writes events in order and returns when they are on disk.

        Raises:
            OSError: if they cannot be written; then none of them is.
        """
        before = self.total
        try:
            with self.transaction():
                receipts = [self._add(event) for event in events]
                if self.total != before:
                    self.put_fact("total", self.total.to_bytes())
        except BaseException as error:
            self.total = before
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{self.path} cannot be written: {error}") from error
            raise
        return receipts

    def _add(self, event: Event) -> Receipt:
        key, offset = self.key_of(event.event_id), self.total.last + 1
        fields = json.dumps(event.fields, separators=(",", ":")) if event.fields else ""
        row = (offset, key, event.user_id, event.item_id, event.time, fields)
        checksum = _checksum(*row)
        run = self.connection.execute
        added = run(
            "INSERT INTO events SELECT ?,?,?,?,?,?,? "
            "WHERE NOT EXISTS (SELECT 1 FROM erased WHERE event_key=?) "
            "ON CONFLICT (event_key) DO NOTHING",
            (*row, checksum, key),
        )
        if added.rowcount == 1:
            total = self.total
            self.total = Total(total.events + 1, offset, _plus(total.sum, checksum))
            return Receipt(offset, True)
        found = run("SELECT offset FROM events WHERE event_key=?", (key,)).fetchone()
        return Receipt(found[0] if found else 0, False)

    def erase(self, user_id: Id) -> int:
        """Overwrites all events and states of a user; returns how many events there were.

        What stays are the salted hashes of the events' ids, so that a late second delivery does not
        bring the user back.
        """
        before = self.total
        try:
            with self.transaction():
                run, total = self.connection.execute, self.total
                rows = run(
                    "SELECT event_key, checksum FROM events WHERE user_id=?", (user_id,)
                ).fetchall()
                for key, checksum in rows:
                    total = Total(total.events - 1, total.last, _plus(total.sum, checksum, -1))
                    run("INSERT OR IGNORE INTO erased VALUES (?)", (key,))
                run("DELETE FROM events WHERE user_id=?", (user_id,))
                run("DELETE FROM states WHERE user_id=?", (user_id,))
                self.put_fact("total", total.to_bytes())
                self.total = total
        except BaseException:
            self.total = before
            raise
        self.checkpoint()
        return len(rows)

    def checkpoint(self) -> None:
        """Moves what is in the write-ahead log into the file and empties it."""
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def key_of(self, event_id: str) -> bytes:
        """16 bytes that stand for an event id in this log."""
        return hashlib.blake2b(event_id.encode(), digest_size=16, key=self._salt).digest()

    # reading

    def after(self, offset: int, limit: int) -> list[Stored]:
        """The events that follow an offset, in order, at most so many.

        Raises:
            DamagedError: naming the offset of a row that is not what was written.
        """
        rows = self.connection.execute(
            "SELECT * FROM events WHERE offset>? ORDER BY offset LIMIT ?", (offset, limit)
        )
        return [self._checked(row) for row in rows]

    def of_user(self, user_id: Id) -> list[Stored]:
        """All events of a user, in the order of arrival."""
        rows = self.connection.execute(
            "SELECT * FROM events WHERE user_id=? ORDER BY offset", (user_id,)
        )
        return [self._checked(row) for row in rows]

    def verify(self) -> int:
        """Reads every row and compares their sum with what was kept; returns how many there are.

        Raises:
            DamagedError: if a row was changed, lost or added, or the file is not whole.
        """
        count = total = 0
        try:
            for row in self.connection.execute("SELECT * FROM events ORDER BY offset"):
                self._checked(row)
                count, total = count + 1, _plus(total, row[6])
        except sqlite3.DatabaseError as error:
            raise DamagedError(
                f"{self.path} is damaged: {error}; restore it from a copy"
            ) from error
        if (count, total) != (self.total.events, self.total.sum):
            raise DamagedError(
                f"{self.path}: expected {self.total.events} events as they were written, found "
                f"{count} that come to another sum; restore it from a copy"
            )
        return count

    def _checked(self, row: Sequence[object]) -> Stored:
        offset, key, user_id, item_id, time, fields, checksum = row
        if _checksum(offset, key, user_id, item_id, time, fields) != checksum:
            raise DamagedError(
                f"{self.path}: the event at offset {offset} is not what was written; restore the "
                "file from a copy"
            )
        read = json.loads(fields) if fields else NO_FIELDS  # type: ignore[arg-type]
        return Stored(offset, key, user_id, item_id, time, read)  # type: ignore[arg-type]


def _checksum(*values: object) -> bytes:
    return _digest(repr(values).encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _plus(total: int, checksum: bytes, sign: int = 1) -> int:
    return (total + sign * int.from_bytes(checksum, "little")) % (1 << 64)
