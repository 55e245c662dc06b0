"""The event log of a shard in an SQLite file, which also keeps the records of its states.

``append`` returns once the events are on disk (WAL, ``synchronous=FULL``): what it has returned
survives a kill and a power cut. Every row has a checksum, which is checked whenever the row is
read; their sum is kept beside them, so that ``verify`` finds a row that was lost or added.

The file says what it is: ``application_id`` is ``APPLICATION`` and ``user_version`` the version of
the format. The writer brings a file of an earlier version up when it opens it; see ``migrations``.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from everlong.server.store import migrations
from everlong.server.store.checksum import checksum, event_checksum
from everlong.server.store.log import (
    NO_FIELDS,
    DamagedError,
    Event,
    Id,
    Receipt,
    Slice,
    Stored,
    Total,
)
from everlong.server.store.sqlite_file import SqliteFile, sqlite_errors
from everlong.server.store.wal_flusher import LONG, WalFlusher
from everlong.system.atomic import sync_folder

log = logging.getLogger(__name__)

PAGE = 4_096
BUSY_MS = 100
"""How long a checkpoint waits for readers; the writer stands still meanwhile."""

SOME = 1_024
"""Rows that are verified at once."""

MAX_OFFSET = (1 << 63) - 1
MASK = (1 << 64) - 1

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


class SqliteReader:
    """Events of one shard on disk; see :class:`~everlong.server.store.log.EventReader`.

    Args:
        path: the file.

    Raises:
        DamagedError: if the file is not a log, or what it says of itself is not what was written.
        NewerFormatError: if a later version of everlong wrote it.
        ValueError: if it is of an earlier version.
        OSError: if the file cannot be opened.
    """

    file: SqliteFile

    def __init__(self, path: Path) -> None:
        self.path = path
        with sqlite_errors(path, "opened"):
            uri = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        self.file = SqliteFile(path, connection)
        with self._closed_on_failure():
            found = migrations.version_of(path, connection)
            if found < migrations.VERSION:
                raise ValueError(
                    f"{path} is an event log of version {found}, expected "
                    f"{migrations.VERSION}: run `everlong upgrade {path.parent}`"
                )
            self._begin()

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            with self.file.errors("opened"):
                yield
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self._check_schema()
        self._salt = self.file.need("salt")
        self.total, self._sum = Total(), 0
        self.look()

    def _check_schema(self) -> None:
        # SQLite does not complain about an index or a rule that is missing
        found = self.file.connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
        ).fetchall()
        if [statement for (statement,) in found] != STATEMENTS:
            raise DamagedError(f"{self.path} has other tables than a log; restore it from a copy")

    def close(self) -> None:
        """Closes the file; nothing is lost without it."""
        self.file.close()

    def look(self) -> Total:
        """The totals as the writer has left them."""
        *total, self._sum = struct.unpack("<QQQ", self.file.need("total"))
        self.total = Total(*total)
        return self.total

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
        # from below the first one, so that a row that was added there is found
        offset, query = ~MAX_OFFSET, "SELECT * FROM events WHERE offset>? AND offset<=? LIMIT ?"
        while True:
            with self.file.errors("read"):
                rows = self.file.connection.execute(query, (offset, last, size)).fetchall()
            if not rows:
                return
            offset = rows[-1][0]
            *values, checksums = columns = tuple(zip(*rows, strict=True))
            try:
                whole = tuple(map(event_checksum, *values)) == checksums
            except (TypeError, ValueError, struct.error):
                whole = False
            if not whole:
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
        with self.file.errors("read"):
            return self.file.connection.execute(
                "SELECT offset, item_id FROM events WHERE user_id=? AND offset>? ORDER BY offset",
                (user_id, after),
            ).fetchall()

    def _events(self, which: str, values: tuple[Id, ...]) -> list[Stored]:
        with self.file.errors("read"):
            rows = self.file.connection.execute(
                f"SELECT * FROM events WHERE {which}",  # noqa: S608 - the clause is from this class
                values,
            )
            return [self._checked(row) for row in rows]

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """A block in which all that is read is of one moment, while the writer goes on."""
        run = self.file.connection.execute
        with self.file.errors("read"):
            run("BEGIN")
            try:
                yield
            finally:
                run("COMMIT")

    def verify(self) -> int:
        """Reads the whole file and compares it with what was kept; returns how many events it has.

        It sees the log as it is at one moment, while the writer goes on. Takes about 5 s a million
        events.

        Raises:
            DamagedError: if a row was changed, lost or added, an index does not fit its table, or
                the file is not whole.
            OSError: if it cannot be read.
        """
        run = self.file.connection.execute
        with self.snapshot():
            total, expected = self.look(), self._sum
            events, found = 0, 0
            # rows beyond the last offset were added by something else
            for *_, checksums in self._columns(MAX_OFFSET, SOME):
                events, found = events + len(checksums), _plus(found, *checksums)
            for (key,) in run("SELECT event_key FROM erased"):
                found = _plus(found, checksum(key))
            wrong = [text for (text,) in run("PRAGMA integrity_check(3)") if text != "ok"]
        if (events, found) != (total.events, expected):
            raise DamagedError(
                f"{self.path}: expected {total.events} events as they were written, found "
                f"{events} whose checksums add up to another sum; restore it from a copy"
            )
        if wrong:
            raise DamagedError(
                f"{self.path} is not what was written: {'; '.join(wrong)}; restore it from a copy"
            )
        return events

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


class SqliteLog(SqliteReader):
    """An :class:`~everlong.server.store.log.EventLog`: the file as its one writer has it.

    One thing is in doubt after ``append`` has refused: if the disk fails while events are made
    durable and the process dies before the next call, they may be there on the next start. A second
    delivery is then answered with the offset of the first.

    Args:
        path: the file.
        new: whether it is made where there is none; else that is damage.
        connect: opens it, without transactions of its own.

    Raises:
        DamagedError: if the file is not a log, or what it says of itself is not what was written.
        NewerFormatError: if a later version of everlong wrote it.
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
        self._refused = False
        self._flusher: WalFlusher | None = None
        make_folder(path.parent)
        with sqlite_errors(path, "opened"):
            self.file = SqliteFile(path, connect(path))
        with self._closed_on_failure():
            self._prepare(new)
            self._begin()
        # also what a kill has left of users who were erased
        self.checkpoint()

    def _prepare(self, new: bool) -> None:
        run = self.file.connection.execute
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
            with self.file.transaction():
                for statement in STATEMENTS:
                    run(statement)
                run(f"PRAGMA application_id={migrations.APPLICATION}")
                run(f"PRAGMA user_version={migrations.VERSION}")
                self.file.put_fact("everlong", version("everlong").encode())
                self.file.put_fact("salt", secrets.token_bytes(16))
                self._put_total(Total(), 0)
            return
        found = migrations.version_of(self.path, self.file.connection)
        if found < migrations.VERSION:
            with self.file.transaction():
                migrations.upgrade(self.path, self.file.connection, found)
            log.info("%s: version %d of a log, now %d", self.path, found, migrations.VERSION)

    def _put_total(self, total: Total, added: int) -> None:
        self.file.put_fact("total", struct.pack("<QQQ", *total, added))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction after which the totals are kept, or are again what they were.

        After a refusal nothing is acknowledged that stands behind what the disk refused: what was
        written without waiting for the disk may be lost. So all that is good is moved into the file
        first, and the write-ahead log begins anew.
        """
        if self._refused and not self.checkpoint():
            raise OSError(f"{self.path} cannot be written yet: it refused before; try again")
        before = self.total, self._sum
        try:
            with self.file.transaction():
                self.look()
                if (self.total, self._sum) != before:
                    raise OSError(
                        f"{self.path} is written by another process too; stop one of them"
                    )
                yield
                if (self.total, self._sum) != before:
                    self._put_total(self.total, self._sum)
        except BaseException:
            self.total, self._sum = before
            self._refused = True
            raise
        self._refused = False

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
        run = self.file.connection.execute
        added = run(
            "INSERT INTO events SELECT ?,?,?,?,?,?,? "
            "WHERE NOT EXISTS (SELECT 1 FROM erased WHERE event_key=?) "
            "ON CONFLICT (event_key) DO NOTHING",
            (*row, sealed, key),
        )
        if added.rowcount == 1:
            self.total, self._sum = Total(self.total.events + 1, offset), _plus(self._sum, sealed)
            return Receipt(offset, True)
        found = run("SELECT offset FROM events WHERE event_key=?", (key,)).fetchone()
        return Receipt(found[0] if found else 0, False)

    def erase(self, user_id: Id) -> int:
        """Overwrites all events of a user; returns how many there were.

        What stays are the salted hashes of the events' ids, so that a late second delivery does not
        bring the user back. Traces in the write-ahead log go with the next ``checkpoint`` if they
        cannot go at once.

        Raises:
            OSError: if it cannot be written; then nothing is erased.
        """
        with self._changing():
            run = self.file.connection.execute
            rows = run(
                "SELECT event_key, checksum FROM events WHERE user_id=?", (user_id,)
            ).fetchall()
            for key, stored in rows:
                self._sum = _plus(_minus(self._sum, stored), checksum(key))
                run("INSERT INTO erased VALUES (?)", (key,))
            self.total = self.total._replace(events=self.total.events - len(rows))
            run("DELETE FROM events WHERE user_id=?", (user_id,))
        self.traces = True
        self.checkpoint()
        return len(rows)

    @property
    def backlog(self) -> int:
        """Bytes of the write-ahead log."""
        with suppress(OSError):
            return self.path.with_name(f"{self.path.name}-wal").stat().st_size
        return 0

    def probe(self) -> None:
        """Raises ``OSError`` while nothing can be written."""
        with self._changing():
            self.file.put_fact("tried", b"")

    def reader(self) -> SqliteReader:
        """A reader of this log for another thread."""
        return SqliteReader(self.path)

    def checkpoint(self) -> bool:
        """Moves what is in the write-ahead log into the file and empties it: no trace stays there.

        Returns:
            False if it could not: something reads, or the disk refuses. Nothing is lost by that.
        """
        with self._alone():
            done = self._checkpoint("TRUNCATE")
        self.traces = self.traces and not done
        return done

    def flush_beside(self) -> Self:
        """Has a thread move the write-ahead log into the file from now on, beside the writer."""
        self._flusher = WalFlusher(self.path)
        return self

    def tidy(self) -> None:
        """Begins the write-ahead log anew once the thread beside has moved enough of it.

        What need not grow is written faster. It is emptied if there may be something in it of a
        user who was erased. Waits for nothing.
        """
        beside = self._flusher
        if beside is None or not beside.ready or not (beside.pages >= LONG or self.traces):
            return
        if not beside.moving.acquire(blocking=False):
            return
        try:
            beside.ready = False
            self.file.connection.execute("PRAGMA busy_timeout=0")
            if self.traces:
                self.traces = not self._checkpoint("TRUNCATE")
            else:
                self._checkpoint("RESTART")
        finally:
            self.file.connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            beside.moving.release()

    def close(self) -> None:
        """Empties the write-ahead log, if it can be, and closes the file."""
        if self._flusher is not None:
            self._flusher.close()
            self._flusher = None
            self.checkpoint()
        super().close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A block in which the thread beside moves nothing."""
        if self._flusher is None:
            yield
        else:
            with self._flusher.moving:
                yield

    def _checkpoint(self, how: str) -> bool:
        try:
            with self.file.errors("written"):
                answer = self.file.connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
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
