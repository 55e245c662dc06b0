"""States are checked against the log: a state that lacks, doubles or reorders an event is found."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.server_writer import check_against_log, opened
from typer.testing import CliRunner

from everlong.cli.app import app
from everlong.server.store.log import DamagedError, Event
from everlong.server.store.record import Record, pack_record, unpack_record
from everlong.server.store.sqlite_log import SqliteReader
from everlong.server.store.verify import verify_states

EVENTS = [Event(f"e{n}", f"u{n % 7}", n % 40, 10**9 + n) for n in range(200)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed shard."""
    path = tmp_path / "shard-0000.sqlite"
    shard = opened(path)
    shard.submit(EVENTS[:150]).result()
    shard.erase("u3").result()
    shard.submit(EVENTS[150:]).result()
    shard.close()
    return path


def test_states_of_the_log_pass(path: Path) -> None:
    with closing(SqliteReader(path)) as log:
        assert verify_states(log) == 7


def test_states_that_are_behind_the_log_pass(path: Path) -> None:
    records = sqlite_records(path)
    shard = opened(path)
    shard.submit([Event("later", "u1", 3, 2 * 10**9)]).result()
    with closing(SqliteReader(path)) as log:
        assert verify_states(log) == 7
    shard.close()
    assert sqlite_records(path) != records


def sqlite_records(path: Path) -> dict[str, bytes]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT user_id, record FROM states").fetchall())


def change(path: Path, user: str, new: Callable[[Record], Record]) -> None:
    """Writes a record of a user that is whole, with other values."""
    record = pack_record(new(unpack_record(sqlite_records(path)[user], user)), user)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE states SET record=? WHERE user_id=?", (record, user))
        connection.commit()


@pytest.mark.parametrize("field", ["offset", "events", "chain", "newest"])
def test_a_state_of_other_events_is_found_and_can_be_forgotten(path: Path, field: str) -> None:
    def moved(record: Record) -> Record:
        watermark = record.watermark
        return record._replace(
            watermark=watermark._replace(**{field: getattr(watermark, field) - 1})
        )

    change(path, "u5", moved)
    with closing(SqliteReader(path)) as log, pytest.raises(DamagedError, match="user 'u5'"):
        verify_states(log)
    result = CliRunner().invoke(app, ["verify", str(path.parent)])
    assert result.exit_code == 3
    assert "--forget-states" in result.stderr
    result = CliRunner().invoke(app, ["verify", "--forget-states", str(path.parent)])
    assert result.exit_code == 0, result.stderr
    assert "states deleted" in result.stdout
    result = CliRunner().invoke(app, ["verify", str(path.parent)])
    assert result.exit_code == 0
    assert "0 states" in result.stdout
    shard = opened(path)
    (states,) = shard.tables.values()
    check_against_log(states, shard.log)
    shard.close()


def test_a_damaged_record_is_no_fault_of_the_log(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE states SET record=substr(record, 2) WHERE user_id='u5'")
        connection.commit()
    with closing(SqliteReader(path)) as log:
        assert verify_states(log) == 6
