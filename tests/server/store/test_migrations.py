"""Logs of earlier versions: every step, damage in every place, and what a writer does by itself."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from everlong.server.store import migrations
from everlong.server.store.log import DamagedError, Event
from everlong.server.store.sqlite_log import SqliteLog, SqliteReader
from everlong.server.store.sqlite_states import SqliteStates
from everlong.server.store.verify import verify_states

STORED = Path(__file__).parents[2] / "formats" / "v1" / "service" / "data" / "shard-0000.sqlite"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A log of version 2."""
    return Path(shutil.copy(STORED, tmp_path / "shard-0000.sqlite"))


def as_version_1(path: Path) -> None:
    """Rewrites a log of version 2 as version 1 had it: other checksums of rows."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        run = connection.execute
        total = migrations._with_row_checksums(
            path, run, migrations._checksum_2, migrations._checksum_1
        )
        total += migrations._erased(run, migrations._checksum_1)
        events, last, _ = struct.unpack("<QQQ", migrations._fact_1(path, run, "total"))
        facts = {"total": struct.pack("<QQQ", events, last, total % 2**64), "version": b"1"}
        for name, value in facts.items():
            sealed = value + migrations._checksum_1(name, value)
            run("UPDATE facts SET value=? WHERE name=?", (sealed, name))


@pytest.mark.parametrize("version", [1, 2])
def test_a_writer_brings_a_log_up_when_it_opens_it(
    old: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if version == 1:
        as_version_1(old)
    with closing(sqlite3.connect(old)) as connection:
        rows = connection.execute(
            "SELECT offset, event_key, user_id, item_id, time FROM events"
        ).fetchall()
    with pytest.raises(ValueError, match=f"of version {version}, expected 3: run `everlong upgr"):
        SqliteReader(old)
    with closing(SqliteLog(old)) as log:
        assert f"version {version} of a log, now 3" in caplog.text
        assert log.verify() == log.total.events == len(rows)
        assert [tuple(event[:5]) for event in log.after(0, 1_000)] == rows
        store = SqliteStates(log)
        assert all(store.mark(model) is not None for model in store.models())
        assert verify_states(log) > 0
        log.append([Event("new", rows[0][2], rows[0][3], 0)])
    caplog.clear()
    with closing(SqliteLog(old)) as log:
        assert "version" not in caplog.text
        assert log.verify() == len(rows) + 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET time=time+1 WHERE offset=(SELECT max(offset) FROM events)",
        "UPDATE events SET user_id=x'00' WHERE offset=(SELECT min(offset) FROM events)",
        "DELETE FROM events WHERE offset=(SELECT min(offset) FROM events)",
        "INSERT INTO erased VALUES (x'00')",
        "UPDATE facts SET value=substr(value, 2) WHERE name='salt'",
        "UPDATE facts SET value=substr(value, 2) WHERE name='version'",
        "DELETE FROM facts WHERE name='version'",
        "DELETE FROM facts WHERE name='total'",
    ],
)
def test_a_damaged_old_log_is_refused_and_left_as_it_is(old: Path, statement: str) -> None:
    with closing(sqlite3.connect(old)) as connection:
        connection.execute(statement)
        connection.commit()
    before = dump(old)
    with pytest.raises(DamagedError):
        SqliteLog(old)
    assert dump(old) == before


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def test_a_mark_of_some_users_stays_one(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        names = connection.execute("SELECT name FROM facts").fetchall()
        (model, *_) = [n.removeprefix("watermark ") for (n,) in names if n.startswith("watermark")]
        name, value = f"incomplete {model}", b"1"
        sealed = value + migrations._checksum_1(name, value)
        connection.execute("INSERT INTO facts VALUES (?, ?)", (name, sealed))
        connection.commit()
    with closing(SqliteLog(old)) as log:
        store = SqliteStates(log)
        marks = {name: store.mark(name) for name in store.models()}
    assert {name for name, mark in marks.items() if mark and not mark.complete} == {model}


def test_a_file_of_another_program_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id=5")
        connection.execute("CREATE TABLE facts (name, value)")
    for kind in (SqliteLog, SqliteReader):
        with pytest.raises(DamagedError, match="is not a log"):
            kind(path)
