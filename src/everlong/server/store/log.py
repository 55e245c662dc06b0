"""The event log of a shard: an SQLite file with one writer, the truth from which all else follows.

An event has an offset, its place in the order of arrival, and an id by which a second delivery is
known. ``append`` returns once the events are on disk (WAL, ``synchronous=FULL``): what it has
returned survives a kill and a power cut. The states of users are kept in the same file as a cache
of the log, so that what is erased is erased together and what is copied fits together.

Every row has a checksum, which is checked whenever the row is read; their sum is kept beside them,
so that a row that was lost or added by anybody else is found by ``verify``.

What ``append`` has refused is not in the log. One thing is in doubt: if the disk fails while a
group is made durable and the process dies before the next, the group may be there on the next
start. A second delivery is then answered with the offset of the first.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from everlong.server.store.checksum import MASK, checksum, event_checksum, event_checksums_fit
from everlong.system.atomic import sync_folder

log = logging.getLogger(__name__)

VERSION = 2
PAGE = 4_096
BUSY_MS = 100
"""How long a checkpoint waits for those who read; the writer stands still meanwhile."""

SOME = 1_024
"""Rows that are verified at once."""

MAX_OFFSET = (1 << 63) - 1

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
    PRIMARY KEY (user_id, model)
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
STATEMENTS = [statement.strip() for statement in SCHEMA.split(";") if statement.strip()]


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


class Slice(NamedTuple):
    """``n`` events of the log, field by field: of many, this takes half the time."""

    offsets: tuple[int, ...]
    keys: tuple[bytes, ...]
    user_ids: tuple[Id, ...]
    item_ids: tuple[Id, ...]
    times: tuple[int, ...]
    fields: tuple[Mapping[str, float | int], ...]

    def __bool__(self) -> bool:
        return bool(self.offsets)

    @staticmethod
    def of(events: Sequence[Stored]) -> Slice:
        """Some events."""
        return Slice(*zip(*events, strict=True)) if events else Slice((), (), (), (), (), ())


class DamagedError(ValueError):
    """A file is not what was written to it."""


class Total(NamedTuple):
    """What all rows come to: how many, the last offset ever given, and the sum of checksums.

    The sum is that of the events and of the keys that were erased.
    """

    events: int = 0
    last: int = 0
    sum: int = 0

    def to_bytes(self) -> bytes:
        return struct.pack("<QQQ", *self)

    def plus(self, *checksums: bytes) -> Total:
        """The totals with some events more."""
        return Total(self.events + len(checksums), self.last, _plus(self.sum, *checksums))

    @staticmethod
    def from_bytes(data: bytes) -> Total:
        return Total(*struct.unpack("<QQQ", data))


class LogReader:
    """Events of one shard on disk, to be read while its writer, if there is one, goes on.

    Args:
        path: the file.

    Raises:
        DamagedError: if the file is not a log, or what it says of itself is not what was written.
        OSError: if the file cannot be opened.
    """

    connection: sqlite3.Connection

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._told("opened"):
            uri = f"{path.absolute().as_uri()}?mode=ro"
            self.connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        self._begin()

    def _begin(self) -> None:
        try:
            with self._told("opened"):
                self._check_schema()
                self._salt = self._need("salt")
                self.total = Total()
                self.look()
        except BaseException:
            self.close()
            raise

    def _check_schema(self) -> None:
        version = self._need("version")
        if version != str(VERSION).encode():
            raise DamagedError(
                f"{self.path}: expected a log of version {VERSION}, found {version!r}"
            )
        # of an index or a rule that is not there SQLite would not complain
        found = self.connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
        ).fetchall()
        if [statement for (statement,) in found] != STATEMENTS:
            raise DamagedError(f"{self.path} has other tables than a log; restore it from a copy")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of SQLite as those of the disk, or of what is on it."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            # a table that is not there, or a text that is none, which comes without a code
            wrong = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
            if isinstance(error, sqlite3.OperationalError) and not wrong:
                raise OSError(f"{self.path} cannot be {what}: {error}") from error
            raise DamagedError(
                f"{self.path} is not what was written: {error}; restore it from a copy"
            ) from error

    def close(self) -> None:
        """Closes the file; nothing is lost without it."""
        self.connection.close()

    def look(self) -> Total:
        """The totals as the writer has left them."""
        self.total = Total.from_bytes(self._need("total"))
        return self.total

    def fact(self, name: str) -> bytes | None:
        """A value by name.

        Raises:
            DamagedError: if it is not what was put.
        """
        row = self.connection.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
        if row is None:
            return None
        value, stored = bytes(row[0][:-8]), bytes(row[0][-8:])
        if checksum(name, value) != stored:
            raise DamagedError(
                f"{self.path}: the fact {name!r} is not what was written; restore the file from a "
                "copy"
            )
        return value

    def _need(self, name: str) -> bytes:
        value = self.fact(name)
        if value is None:
            raise DamagedError(f"{self.path} has no fact {name!r}; restore it from a copy")
        return value

    def key_of(self, event_id: str) -> bytes:
        """16 bytes that stand for an event id in this log."""
        return blake2b(event_id.encode(), digest_size=16, key=self._salt).digest()

    def after(self, offset: int, limit: int) -> list[Stored]:
        """The events that follow an offset, in order, at most so many.

        Raises:
            DamagedError: naming the offset of a row that is not what was written.
        """
        return self._events("offset>? ORDER BY offset LIMIT ?", (offset, limit))

    def slices(self, last: int, size: int) -> Iterator[Slice]:
        """All events up to an offset, in order, at most ``size`` at once.

        Raises:
            DamagedError: naming the offset of a row that is not what was written.
        """
        for offsets, keys, user_ids, item_ids, times, texts, _ in self._columns(last, size):
            # most logs have none
            fields = (NO_FIELDS,) * len(offsets)
            if any(texts):
                fields = tuple(json.loads(text) if text else NO_FIELDS for text in texts)
            yield Slice(offsets, keys, user_ids, item_ids, times, fields)

    def _columns(self, last: int, size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
        """All rows up to an offset, field by field, whole."""
        # from below the first one, so that what somebody has added there is found
        offset, query = ~MAX_OFFSET, "SELECT * FROM events WHERE offset>? AND offset<=? LIMIT ?"
        while True:
            with self._told("read"):
                rows = self.connection.execute(query, (offset, last, size)).fetchall()
            if not rows:
                return
            offset = rows[-1][0]
            columns = tuple(zip(*rows, strict=True))
            if not event_checksums_fit(*columns):
                # one of them is not whole, and is named
                for row in rows:
                    self._checked(row)
            yield columns

    def of_user(self, user_id: Id) -> list[Stored]:
        """All events of a user, in the order of arrival."""
        return self._events("user_id=? ORDER BY offset", (user_id,))

    def last_of_user(self, user_id: Id, count: int) -> list[Stored]:
        """The last events of a user, newest first."""
        return self._events("user_id=? ORDER BY offset DESC LIMIT ?", (user_id, count))

    def items_of_user(self, user_id: Id, after: int) -> list[tuple[int, Id]]:
        """Offsets and items of a user's events after an offset, in the order of arrival.

        From the index alone: ``verify`` is what checks that.
        """
        with self._told("read"):
            return self.connection.execute(
                "SELECT offset, item_id FROM events WHERE user_id=? AND offset>? ORDER BY offset",
                (user_id, after),
            ).fetchall()

    def _events(self, which: str, values: tuple[Id, ...]) -> list[Stored]:
        with self._told("read"):
            # what is put into the statement is from this class
            rows = self.connection.execute(f"SELECT * FROM events WHERE {which}", values)  # noqa: S608
            return [self._checked(row) for row in rows]

    def verify(self) -> int:
        """Reads the whole file and compares it with what was kept; returns how many events it has.

        It sees the log as it is at one moment, while the writer goes on. Takes about 5 s a million
        events.

        Raises:
            DamagedError: if a row was changed, lost or added, an index does not fit its table, or
                the file is not whole.
            OSError: if it cannot be read.
        """
        run = self.connection.execute
        with self._told("read"):
            run("BEGIN")
            try:
                total, found = self.look(), Total(last=self.total.last)
                # offsets beyond the last one are of nobody
                for *_, stored in self._columns(MAX_OFFSET, SOME):
                    found = found.plus(*stored)
                for (key,) in run("SELECT event_key FROM erased"):
                    found = found._replace(sum=_plus(found.sum, checksum(key)))
                wrong = [text for (text,) in run("PRAGMA integrity_check(3)") if text != "ok"]
            finally:
                run("COMMIT")
        if found != total:
            raise DamagedError(
                f"{self.path}: expected {total.events} events as they were written, found "
                f"{found.events} that come to another sum; restore it from a copy"
            )
        if wrong:
            raise DamagedError(
                f"{self.path} is not what was written: {'; '.join(wrong)}; restore it from a copy"
            )
        return found.events

    def _checked(self, row: tuple[Any, ...]) -> Stored:
        offset, key, user_id, item_id, time, fields, stored = row
        try:
            whole = event_checksum(offset, key, user_id, item_id, time, fields) == stored
        except (TypeError, ValueError, struct.error):
            whole = False
        if not whole:
            raise DamagedError(
                f"{self.path}: the event at offset {offset} is not what was written; restore the "
                "file from a copy"
            )
        read = json.loads(fields) if fields else NO_FIELDS
        return Stored(offset, key, user_id, item_id, time, read)


def _connect(path: Path) -> sqlite3.Connection:
    # the service hands it to the thread of the shard's writer
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


class EventLog(LogReader):
    """The log of a shard as its one writer has it.

    Args:
        path: the file.
        new: whether it is made where there is none; else that is damage.
        connect: opens it, without transactions of its own.

    Raises:
        DamagedError: if the file is not a log, or what it says of itself is not what was written.
        OSError: if the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        new: bool = True,
        connect: Callable[[Path], sqlite3.Connection] = _connect,
    ) -> None:
        self.path = path
        self.traces = True
        """Whether something of users who were erased may be in the write-ahead log: after a kill,
        and where it could not be emptied."""
        make_folder(path.parent)
        with self._told("opened"):
            self.connection = connect(path)
        try:
            with self._told("opened"):
                self._prepare(new)
        except BaseException:
            self.close()
            raise
        self._begin()

    def _prepare(self, new: bool) -> None:
        run = self.connection.execute
        run(f"PRAGMA page_size={PAGE}")
        # what is erased is overwritten, not only let go
        for pragma in ("secure_delete=ON", "journal_mode=WAL", "synchronous=FULL"):
            run(f"PRAGMA {pragma}")
        # moved by ``checkpoint``, between groups of events
        run("PRAGMA wal_autocheckpoint=0")
        # 64 MiB: the indexes of ids are written all over
        run("PRAGMA cache_size=-65536")
        run(f"PRAGMA busy_timeout={BUSY_MS}")
        if not run("SELECT 1 FROM sqlite_master").fetchone():
            if not new:
                raise DamagedError(
                    f"{self.path} is empty or missing, and was not; restore it from a copy"
                )
            with self.transaction():
                for statement in STATEMENTS:
                    run(statement)
                self.put_fact("version", str(VERSION).encode())
                self.put_fact("salt", secrets.token_bytes(16))
                self.put_fact("total", Total().to_bytes())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside reaches the disk together, or none of it does.

        Raises:
            OSError: if it cannot be written.
        """
        run = self.connection.execute
        with self._told("written"):
            run("BEGIN IMMEDIATE")
            try:
                yield
                run("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    run("ROLLBACK")
                raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction after which the totals are kept, or are again what they were."""
        before = self.total
        try:
            with self.transaction():
                if self.look() != before:
                    raise OSError(
                        f"{self.path} is written by another process too; stop one of them"
                    )
                yield
                if self.total != before:
                    self.put_fact("total", self.total.to_bytes())
        except BaseException:
            self.total = before
            raise

    def put_fact(self, name: str, value: bytes) -> None:
        """Sets a value by name."""
        self.connection.execute(
            "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value=excluded.value",
            (name, value + checksum(name, value)),
        )

    def drop_fact(self, name: str) -> None:
        """Takes a value by name away, if it is there."""
        self.connection.execute("DELETE FROM facts WHERE name=?", (name,))

    def append(self, events: Sequence[Event]) -> list[Receipt]:
        """Writes events in order and returns when they are on disk.

        Raises:
            OSError: if they cannot be written; then none of them is.
        """
        with self._changing():
            return [self._add(event) for event in events]

    def _add(self, event: Event) -> Receipt:
        key, offset = self.key_of(event.event_id), self.total.last + 1
        fields = json.dumps(event.fields, separators=(",", ":")) if event.fields else ""
        row = (offset, key, event.user_id, event.item_id, event.time, fields)
        sealed = event_checksum(*row)
        run = self.connection.execute
        added = run(
            "INSERT INTO events SELECT ?,?,?,?,?,?,? "
            "WHERE NOT EXISTS (SELECT 1 FROM erased WHERE event_key=?) "
            "ON CONFLICT (event_key) DO NOTHING",
            (*row, sealed, key),
        )
        if added.rowcount == 1:
            self.total = self.total.plus(sealed)._replace(last=offset)
            return Receipt(offset, True)
        found = run("SELECT offset FROM events WHERE event_key=?", (key,)).fetchone()
        return Receipt(found[0] if found else 0, False)

    def erase(self, user_id: Id) -> int:
        """Overwrites all events and states of a user; returns how many events there were.

        What stays are the salted hashes of the events' ids, so that a late second delivery does not
        bring the user back. Traces in the write-ahead log go with the next ``checkpoint`` if they
        cannot go at once.

        Raises:
            OSError: if it cannot be written; then nothing is erased.
        """
        with self._changing():
            run = self.connection.execute
            rows = run(
                "SELECT event_key, checksum FROM events WHERE user_id=?", (user_id,)
            ).fetchall()
            for key, stored in rows:
                total = self.total
                left = _plus(_minus(total.sum, stored), checksum(key))
                self.total = Total(total.events - 1, total.last, left)
                run("INSERT INTO erased VALUES (?)", (key,))
            run("DELETE FROM events WHERE user_id=?", (user_id,))
            run("DELETE FROM states WHERE user_id=?", (user_id,))
        self.traces = True
        self.checkpoint()
        return len(rows)

    def checkpoint(self) -> bool:
        """Moves what is in the write-ahead log into the file and empties it: no trace stays there.

        Returns:
            False if it could not: somebody reads, or the disk refuses. Nothing is lost by that.
        """
        done = self._checkpoint("TRUNCATE")
        self.traces = self.traces and not done
        return done

    def wrap(self) -> bool:
        """The same, but the next events overwrite it: what need not grow is written faster.

        It is emptied all the same if there may be something in it of a user who was erased. Nobody
        is waited for.
        """
        self.connection.execute("PRAGMA busy_timeout=0")
        try:
            return self.checkpoint() if self.traces else self._checkpoint("RESTART")
        finally:
            self.connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")

    def _checkpoint(self, how: str) -> bool:
        try:
            with self._told("written"):
                answer = self.connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
        except (OSError, DamagedError) as error:
            log.warning("the write-ahead log cannot be emptied: %s", error)
            return False
        return bool(answer[0] == 0)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, with names that a power cut leaves.

    Raises:
        OSError: if it cannot be made.
    """
    missing = [one for one in (folder, *folder.absolute().parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.absolute().parent)


def _plus(total: int, *checksums: bytes) -> int:
    return (total + sum(int.from_bytes(one, "little") for one in checksums)) & MASK


def _minus(total: int, checksum: bytes) -> int:
    return (total - int.from_bytes(checksum, "little")) & MASK
