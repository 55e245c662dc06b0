"""A file that is not what was written is refused, or all that is read from it is right."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.forms import forms
from tests.server_writer import ITEMS, opened, table

from everlong.server.engine.shard import Shard
from everlong.server.store.log import DamagedError, Event, Receipt, Stored
from everlong.server.store.sqlite_log import PAGE, SqliteLog, SqliteReader
from everlong.system.formats import NewerFormatError

USERS = 12
EVENTS = [
    Event(f"e{n}", f"user-{n % USERS}", n * 7 % (ITEMS + 3), 10**9 + n, {"x": n} if n % 5 else {})
    for n in range(400)
]


class Read(NamedTuple):
    """All that can be read from a shard."""

    events: list[Stored]
    of_users: list[list[Stored]]
    last: list[list[Stored]]
    seen: list[set[Any]]
    receipts: list[Receipt]
    standings: list[Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Read, list[torch.Tensor]]:
    """The file of a closed shard, and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "shard.sqlite"
    shard = opened(path)
    for start in range(0, len(EVENTS), 50):
        shard.submit(EVENTS[start : start + 50]).result()
    shard.erase("user-3").result()
    shard.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    data = path.read_bytes()
    found = read(path)
    path.write_bytes(data)
    return path, *found


def read(path: Path, *, verify: bool = True) -> tuple[Read, list[torch.Tensor]]:
    """Starts a shard as the service does, and reads everything."""
    shard = Shard.open(path)
    try:
        if verify:
            with closing(SqliteReader(path)) as beside:
                beside.verify()
        states = table()
        shard.bring_up(states)
        users = [f"user-{n}" for n in range(USERS)]
        log, seen = shard.log, "SELECT DISTINCT item_id FROM events WHERE user_id=?"
        found = Read(
            log.after(0, 10_000),
            [log.of_user(user) for user in users],
            [log.last_of_user(user, 3) for user in users],
            [{item for (item,) in log.file.connection.execute(seen, (user,))} for user in users],
            shard.submit(EVENTS).result(),
            [states.watermark(user) for user in users],
        )
        return found, list(states.read(users))
    finally:
        shard.close()


def same(a: tuple[Read, list[torch.Tensor]], b: tuple[Read, list[torch.Tensor]]) -> bool:
    close = (torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and all(close)


@pytest.mark.parametrize("flips", forms("FLIPS", "60", "500"))
def test_every_flipped_bit_is_found_or_does_no_harm(
    whole: tuple[Path, Read, list[torch.Tensor]], tmp_path: Path, flips: str
) -> None:
    source, *expected = whole
    data, draw, outcomes = source.read_bytes(), random.Random(0), Counter[str]()
    for number in range(int(flips)):
        spoiled, page = bytearray(data), draw.randrange(len(data) // PAGE)
        # what says where things are comes first in a page
        place = page * PAGE + draw.randrange(draw.choice([PAGE, 128]))
        spoiled[place] ^= 1 << draw.randrange(8)
        path = tmp_path / f"flip-{number}.sqlite"
        path.write_bytes(spoiled)
        try:
            found = read(path)
        # a bit of the version itself may say that it is a later one
        except (DamagedError, NewerFormatError):
            outcomes["refused"] += 1
        else:
            assert same(found, (expected[0], expected[1])), f"byte {place} of {len(data)}"
            outcomes["harmless"] += 1
        path.unlink(missing_ok=True)
    print(dict(outcomes))
    assert outcomes["refused"] > int(flips) / 10
    assert outcomes["harmless"] > 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET time=time+1 WHERE offset=9",
        "DELETE FROM events WHERE offset=9",
        "UPDATE events SET offset=10000 WHERE offset=9",
        "INSERT INTO events SELECT 10000, x'00', user_id, item_id, time, fields, checksum "
        "FROM events WHERE offset=9",
        "DELETE FROM erased WHERE event_key=(SELECT min(event_key) FROM erased)",
        "INSERT INTO erased VALUES (x'00')",
        "UPDATE erased SET event_key=x'00' WHERE event_key=(SELECT min(event_key) FROM erased)",
        "UPDATE facts SET value=substr(value, 2) WHERE name='salt'",
        "DELETE FROM facts WHERE name='salt'",
        "DELETE FROM facts WHERE name='total'",
        "UPDATE facts SET value=(SELECT value FROM facts WHERE name='salt') WHERE name='total'",
        "UPDATE facts SET value=x'3939' WHERE name LIKE 'watermark%'",
        "DROP INDEX events_of_user",
        "DROP TABLE states",
        "PRAGMA user_version=0",
        "PRAGMA user_version=2",
        "PRAGMA application_id=7",
    ],
)
def test_a_changed_log_is_refused(
    whole: tuple[Path, Read, list[torch.Tensor]], tmp_path: Path, statement: str
) -> None:
    path = changed(whole[0], tmp_path, statement)
    with pytest.raises(DamagedError):
        read(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM states WHERE user_id='user-5'",
        "DELETE FROM states",
        "UPDATE states SET record=substr(record, 2) WHERE user_id='user-5'",
        "UPDATE states SET record=x'' WHERE user_id='user-5'",
        "UPDATE states SET model='another' WHERE user_id='user-5'",
        "UPDATE states SET record=(SELECT record FROM states WHERE user_id='user-6') "
        "WHERE user_id='user-5'",
        "INSERT INTO states SELECT model, 'stranger', record FROM states WHERE user_id='user-5'",
        "DELETE FROM facts WHERE name LIKE 'watermark%'",
    ],
)
def test_states_that_are_not_those_of_the_log_are_built_anew(
    whole: tuple[Path, Read, list[torch.Tensor]], tmp_path: Path, statement: str
) -> None:
    source, *expected = whole
    path = changed(source, tmp_path, statement)
    assert same(read(path), (expected[0], expected[1]))


def changed(source: Path, folder: Path, statement: str) -> Path:
    path = folder / "changed.sqlite"
    path.write_bytes(source.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        before = connection.total_changes
        connection.execute(statement)
        assert connection.total_changes > before or statement.startswith(("DROP", "PRAGMA"))
        connection.commit()
    return path


@pytest.mark.parametrize("index", ["events_of_user", "sqlite_autoindex_events_1"])
def test_an_index_that_does_not_fit_its_table_is_refused(
    whole: tuple[Path, Read, list[torch.Tensor]], tmp_path: Path, index: str
) -> None:
    """A page of the index is put back to what it was before the last events came."""
    path = tmp_path / "index.sqlite"
    log = SqliteLog(path)
    log.append(EVENTS[:20])
    log.checkpoint()
    (root,) = log.file.connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name=?", (index,)
    ).fetchone()
    place = slice((root - 1) * PAGE, root * PAGE)
    before = path.read_bytes()[place]
    log.append(EVENTS[20:22])
    log.close()
    data = bytearray(path.read_bytes())
    assert data[place] != before
    data[place] = before
    path.write_bytes(data)
    log = SqliteLog(path)
    with pytest.raises(DamagedError):
        log.verify()
    log.close()


@pytest.mark.parametrize("offset", [-7, 0, 1_000])
def test_a_row_that_another_program_added_is_found(tmp_path: Path, offset: int) -> None:
    with closing(SqliteLog(tmp_path / "log.sqlite")) as log:
        log.append(EVENTS[:20])
        assert log.verify() == 20
        log.file.connection.execute(
            "INSERT INTO events SELECT ?, ?, user_id, item_id, time, fields, checksum "
            "FROM events WHERE offset=1",
            (offset, bytes(16)),
        )
        with pytest.raises(DamagedError):
            log.verify()


def test_what_is_not_a_whole_log_is_refused(
    whole: tuple[Path, Read, list[torch.Tensor]], tmp_path: Path
) -> None:
    data, path = whole[0].read_bytes(), tmp_path / "other.sqlite"
    # zeros at the end are read as zeros where they are missing: nothing is lost by that
    last = len(data.rstrip(b"\0"))
    for size in (50, 512, PAGE, PAGE + 100, len(data) // 2, len(data) - PAGE, last - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            read(path)
    for other in (b"not a log " * 1_000, bytes(3 * PAGE), data[PAGE:]):
        path.write_bytes(other)
        with pytest.raises(DamagedError):
            SqliteLog(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE facts (name, value)")
    with pytest.raises(DamagedError):
        SqliteLog(path)
    with pytest.raises(OSError, match="cannot be opened"):
        SqliteLog(tmp_path)
    with pytest.raises(OSError, match="cannot be opened"):
        SqliteReader(tmp_path / "nothing.sqlite")
    # an empty file is what a crash before the first transaction leaves
    path.write_bytes(b"")
    with closing(SqliteLog(path)) as log:
        assert log.verify() == 0
