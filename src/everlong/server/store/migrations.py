"""Migrations of the SQLite file of a shard: from each version of the format to the next.

All steps run in one transaction of the writer, so a file is of one version or of another, whatever
happens. What a version wrote is checked before it is written anew: damage is refused as ever, and
an older version is none.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from everlong.server.store.checksum import checksum, event_checksum
from everlong.server.store.log import DamagedError
from everlong.system.formats import check_version, migrate

APPLICATION = 0x45764C67
"""What marks a file as a log of ours."""

ROWS = 1_024
"""Rows that are written anew at once."""

MASK = (1 << 64) - 1

RowChecksum = Callable[..., bytes]


def version_of(path: Path, connection: sqlite3.Connection) -> int:
    """The version of an open log.

    Raises:
        DamagedError: if it is no log.
        NewerFormatError: if a later version of everlong wrote it.
    """
    application, found = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application == 0 and found == 0:
        # up to version 2 the version was a fact
        row = connection.execute("SELECT value FROM facts WHERE name='version'").fetchone()
        text = bytes(row[0][:-8]) if row else b""
        if not text.isdigit() or _checksum_1("version", text) != bytes(row[0][-8:]):
            raise DamagedError(f"{path} is not a log, or not what was written: restore it")
        return int(text)
    if application != APPLICATION or found < 1:
        raise DamagedError(
            f"{path} is not a log, or not what was written: expected application "
            f"{APPLICATION:#x} and a version, found {application:#x} and {found}; restore it from "
            "a copy"
        )
    row = connection.execute("SELECT value FROM facts WHERE name='everlong'").fetchone()
    written_by = bytes(row[0][:-8]).decode(errors="replace") if row else None
    return check_version(path, KIND, found, VERSION, written_by=written_by)


def upgrade(path: Path, connection: sqlite3.Connection, found: int) -> None:
    """Brings a log up from version ``found``, inside a transaction of the caller.

    Raises:
        DamagedError: if it is not what that version wrote.
    """
    migrate((path, connection), found, MIGRATIONS)


def _checksum_1(*values: object) -> bytes:
    """Of anything, up to version 2."""
    return blake2b(repr(values).encode(), digest_size=8).digest()


def _checksum_2(
    offset: int, key: bytes, user_id: int | str, item_id: int | str, time: int, fields: str
) -> bytes:
    """Of a row, in version 2: arithmetic on words of 64 bits; of a text that is its CRC-32."""
    found, halves = 0, struct.unpack("<QQ", key)
    for value in (offset, *halves, time, user_id, item_id, fields):
        word = crc32(value.encode()) + (1 << 32) if isinstance(value, str) else value & MASK
        found = (found ^ word) * 0x9E3779B97F4A7C15 & MASK
        found ^= found >> 32
    return found.to_bytes(8, "little")


def _with_row_checksums(
    path: Path, run: Callable[..., Any], before: RowChecksum, after: RowChecksum
) -> int:
    """Writes the checksums of all events anew; returns the sum of the new ones.

    Raises:
        DamagedError: if a row is not what was written, or rows were lost or added.
    """
    count = old_sum = new_sum = offset = 0
    query = "SELECT * FROM events WHERE offset>? ORDER BY offset LIMIT ?"
    while rows := run(query, (offset, ROWS)).fetchall():
        for *values, stored in rows:
            try:
                whole = before(*values) == stored
            except (TypeError, ValueError, AttributeError, struct.error):
                whole = False
            if not whole:
                raise DamagedError(
                    f"{path}: the event at offset {values[0]} is not what was written; restore "
                    "the file from a copy"
                )
            new = after(*values)
            run("UPDATE events SET checksum=? WHERE offset=?", (new, values[0]))
            old_sum += int.from_bytes(stored, "little")
            new_sum += int.from_bytes(new, "little")
        count, offset = count + len(rows), rows[-1][0]
    old_sum += sum(
        int.from_bytes(_checksum_1(key), "little") for (key,) in run("SELECT event_key FROM erased")
    )
    total = struct.unpack("<QQQ", _fact_1(path, run, "total"))
    if (count, old_sum & MASK) != (total[0], total[2]):
        raise DamagedError(
            f"{path}: expected {total[0]} events as they were written, found {count} whose "
            "checksums add up to another sum; restore it from a copy"
        )
    return new_sum


def _fact_1(path: Path, run: Callable[..., Any], name: str) -> bytes:
    row = run("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
    if row is None or _checksum_1(name, bytes(row[0][:-8])) != bytes(row[0][-8:]):
        raise DamagedError(
            f"{path}: the fact {name!r} is not what was written; restore the file from a copy"
        )
    return bytes(row[0][:-8])


def _erased(run: Callable[..., Any], checksum_of: Callable[[bytes], bytes]) -> int:
    keys = run("SELECT event_key FROM erased").fetchall()
    return sum(int.from_bytes(checksum_of(key), "little") for (key,) in keys)


Log = tuple[Path, sqlite3.Connection]


def _version_2(log: Log) -> Log:
    """Checksums of rows by plain arithmetic."""
    path, run = log[0], log[1].execute
    new_sum = _with_row_checksums(path, run, _checksum_1, _checksum_2) + _erased(run, _checksum_1)
    events, last, _ = struct.unpack("<QQQ", _fact_1(path, run, "total"))
    for name, value in (
        ("total", struct.pack("<QQQ", events, last, new_sum & MASK)),
        ("version", b"2"),
    ):
        run("UPDATE facts SET value=? WHERE name=?", (value + _checksum_1(name, value), name))
    return log


def _version_3(log: Log) -> Log:
    """Checksums by xxh3; the version where SQLite has a place for it; one fact a model."""
    path, run = log[0], log[1].execute
    new_sum = _with_row_checksums(path, run, _checksum_2, event_checksum) + _erased(run, checksum)
    names = {name for (name,) in run("SELECT name FROM facts").fetchall()}
    facts = {name: _fact_1(path, run, name) for name in names - {"version", "tried"}}
    events, last, _ = struct.unpack("<QQQ", facts["total"])
    facts["total"] = struct.pack("<QQQ", events, last, new_sum & MASK)
    for name in names:
        if name.startswith("incomplete "):
            del facts[name]
            mark = f"watermark {name.removeprefix('incomplete ')}"
            if mark in facts:
                facts[mark] += b" incomplete"
    facts["everlong"] = version("everlong").encode()
    run("DELETE FROM facts")
    for name, value in facts.items():
        run("INSERT INTO facts VALUES (?, ?)", (name, value + checksum(name, value)))
    run(f"PRAGMA application_id={APPLICATION}")
    run("PRAGMA user_version=3")
    return log


MIGRATIONS: tuple[Callable[[Log], Log], ...] = (_version_2, _version_3)

VERSION = len(MIGRATIONS) + 1
KIND = "an event log"
