"""The durable core: what was acknowledged is there once and in order, whatever happens."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.server_writer import ITEMS, check_against_log, opened

from everlong.server.engine.shard import Shard
from everlong.server.engine.write_queue import FullError
from everlong.server.store.log import DamagedError, Event
from everlong.server.store.sqlite_log import SqliteLog
from everlong.server.store.state_table import StateTable


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    found = opened(tmp_path / "shard.sqlite")
    yield found
    found.close()


def arena_of(shard: Shard) -> StateTable:
    (found,) = shard.tables.values()
    return found


def some_events(count: int, *, users: int = 5, seed: int = 0) -> list[Event]:
    draw = random.Random(seed)
    return [
        Event(f"{seed}-{n}", draw.randrange(users), draw.randrange(ITEMS + 5), 10**9 + n)
        for n in range(count)
    ]


def test_an_event_is_applied_once(shard: Shard) -> None:
    events = some_events(40)
    first = shard.submit(events).result()
    again = shard.submit(events[10:20]).result()
    assert [r.offset for r in first] == list(range(1, 41))
    assert all(r.new for r in first)
    assert [r.offset for r in again] == list(range(11, 21))
    assert not any(r.new for r in again)
    assert shard.applied.events == 40
    check_against_log(arena_of(shard), shard.log)


def test_a_restart_goes_on_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "shard.sqlite"
    for seed in range(3):
        shard = opened(path)
        shard.submit(some_events(30, seed=seed)).result()
        shard.close()
    shard = opened(path)
    # nothing had to be replayed: the states were written on the way out
    assert shard.applied.events == 0
    check_against_log(arena_of(shard), shard.log)
    shard.close()


def test_damaged_states_are_rebuilt_and_a_damaged_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.sqlite"
    shard = opened(path)
    shard.submit(some_events(60)).result()
    shard.close()
    connection = sqlite3.connect(path)
    record = connection.execute("SELECT record FROM states WHERE user_id=2").fetchone()[0]
    spoiled = bytearray(record)
    spoiled[70] ^= 1
    connection.execute("UPDATE states SET record=? WHERE user_id=2", (bytes(spoiled),))
    connection.commit()
    shard = opened(path)
    check_against_log(arena_of(shard), shard.log)
    shard.close()
    connection.execute("UPDATE events SET item_id=item_id+1 WHERE offset=7")
    connection.commit()
    log = SqliteLog(path)
    with pytest.raises(DamagedError, match="offset 7"):
        log.verify()
    connection.execute("DELETE FROM events WHERE offset=7")
    connection.commit()
    with pytest.raises(DamagedError, match="expected 60 events"):
        log.verify()
    connection.close()


def test_an_erased_user_is_gone_and_late_deliveries_do_not_bring_them_back(
    tmp_path: Path,
) -> None:
    path = tmp_path / "shard.sqlite"
    shard = opened(path)
    events = [Event(f"e{n}", f"user-{n % 3}", n % ITEMS, 10**9 + n) for n in range(60)]
    shard.submit(events).result()
    assert shard.erase("user-1").result() == 20
    assert arena_of(shard).watermark("user-1") is None
    assert not any(r.new for r in shard.submit(events[1:2]).result())
    assert arena_of(shard).watermark("user-1") is None
    shard.log.verify()
    shard.close()
    for file in tmp_path.iterdir():
        assert b"user-1" not in file.read_bytes()
    # a user who comes back is a new one
    shard = opened(path)
    shard.submit([Event("later", "user-1", 3, 2 * 10**9)]).result()
    check_against_log(arena_of(shard), shard.log)
    shard.close()


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    shard = opened(tmp_path / "shard.sqlite", capacity=10)
    with pytest.raises(FullError, match="at most 10"):
        shard.submit(some_events(11))
    shard.submit(some_events(10)).result()
    shard.close()


def test_readers_never_see_half_a_state(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, broken = threading.Event(), []
    shard.submit(some_events(20, users=1)).result()

    def look() -> None:
        while not stop.is_set():
            before = arena_of(shard).watermark(0)
            state = arena_of(shard).read([0])
            after = arena_of(shard).watermark(0)
            if before == after and not bool(torch.isfinite(state.user).all()):
                broken.append(state)

    reader = threading.Thread(target=look)
    reader.start()
    for seed in range(1, 40):
        shard.submit(some_events(5, users=1, seed=seed)).result()
    stop.set()
    reader.join()
    assert not broken
    check_against_log(arena_of(shard), shard.log)


def test_a_write_that_the_disk_refuses_raises_and_acknowledges_nothing(
    tmp_path: Path,
) -> None:
    shard = opened(tmp_path / "shard.sqlite")
    shard.submit(some_events(5)).result()
    shard.log.file.connection.execute("PRAGMA query_only=ON")
    with pytest.raises(OSError, match="cannot be written"):
        shard.submit(some_events(5, seed=1)).result()
    assert not shard.writable
    assert shard.log.total.events == 5
    shard.log.file.connection.execute("PRAGMA query_only=OFF")
    assert all(r.new for r in shard.submit(some_events(5, seed=1)).result())
    assert shard.writable
    check_against_log(arena_of(shard), shard.log)
    shard.close()
