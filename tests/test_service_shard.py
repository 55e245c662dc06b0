"""The durable core: what was acknowledged is there once and in order, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everlong.batch import Batch
from everlong.encode import serving
from everlong.service.arena import Arena, added, chained
from everlong.service.log import DamagedError, Event, EventLog, Stored
from everlong.service.shard import FullError, Shard
from service_writer import ITEMS, opened

KILLS = int(os.environ.get("EVERLONG_KILLS", "8"))
"""How often the writer is killed; the long form is 200."""


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    found = opened(tmp_path / "shard.sqlite")
    yield found
    found.close()


def arena_of(shard: Shard) -> Arena:
    (found,) = shard.arenas.values()
    return found


def some_events(count: int, *, users: int = 5, seed: int = 0) -> list[Event]:
    draw = random.Random(seed)
    return [
        Event(f"{seed}-{n}", draw.randrange(users), draw.randrange(ITEMS + 5), 10**9 + n)
        for n in range(count)
    ]


def check_against_log(shard_arena: Arena, log: EventLog) -> None:
    """Standing and states are those of the events of the log, each once and in order."""
    events = log.after(0, 1_000_000)
    users = {event.user_id for event in events}
    assert len(shard_arena) == len(users)
    for user in users:
        mine = [event for event in events if event.user_id == user]
        check_user(shard_arena, mine)


def check_user(shard_arena: Arena, mine: list[Stored]) -> None:
    found, chain, total = shard_arena.standing(mine[0].user_id), 0, 0
    for event in mine:
        chain, total = chained(chain, event.event_key), added(total, event.event_key)
    assert found is not None
    assert (found.offset, found.events) == (mine[-1].offset, len(mine))
    assert (found.chain, found.sum) == (chain, total)
    known = [event.item_id for event in mine if event.item_id < ITEMS]
    model = shard_arena.model
    with serving(model):
        expected = model.advance(Batch.from_histories([known]))
    for a, b in zip(shard_arena.read([mine[0].user_id]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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
    log = EventLog(path)
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
    events = [Event(f"e{n}", f"somebody-{n % 3}", n % ITEMS, 10**9 + n) for n in range(60)]
    shard.submit(events).result()
    assert shard.erase("somebody-1").result() == 20
    assert arena_of(shard).standing("somebody-1") is None
    assert not any(r.new for r in shard.submit(events[1:2]).result())
    assert arena_of(shard).standing("somebody-1") is None
    shard.log.verify()
    shard.close()
    for file in tmp_path.iterdir():
        assert b"somebody-1" not in file.read_bytes()
    # a user who comes back is a new one
    shard = opened(path)
    shard.submit([Event("later", "somebody-1", 3, 2 * 10**9)]).result()
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
            before = arena_of(shard).standing(0)
            state = arena_of(shard).read([0])
            after = arena_of(shard).standing(0)
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


def test_a_disk_that_refuses_is_told_and_nothing_is_acknowledged(
    tmp_path: Path,
) -> None:
    shard = opened(tmp_path / "shard.sqlite")
    shard.submit(some_events(5)).result()
    shard.log.connection.execute("PRAGMA query_only=ON")
    with pytest.raises(OSError, match="cannot be written"):
        shard.submit(some_events(5, seed=1)).result()
    assert not shard.writable
    assert shard.log.total.events == 5
    shard.log.connection.execute("PRAGMA query_only=OFF")
    assert all(r.new for r in shard.submit(some_events(5, seed=1)).result())
    assert shard.writable
    check_against_log(arena_of(shard), shard.log)
    shard.close()


def test_nothing_is_lost_doubled_or_reordered_by_kills(tmp_path: Path) -> None:
    acknowledged: dict[str, int] = {}
    draw = random.Random(0)
    writer = Path(__file__).with_name("service_writer.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    for number in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, str(writer), str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Timer(draw.uniform(0.0, 0.2), process.send_signal, [signal.SIGKILL]).start()
        for line in process.stdout:
            if not line.endswith("\n"):
                break
            for told in line.split():
                name, _, offset = told.rpartition(":")
                assert acknowledged.setdefault(name, int(offset)) == int(offset)
        process.wait()
        process.stdout.close()
    shard = opened(tmp_path / "shard.sqlite")
    log = shard.log
    assert log.verify() >= len(acknowledged) > KILLS
    offset_of = {event.event_key: event.offset for event in log.after(0, 1_000_000)}
    assert {name: offset_of.get(log.key_of(name)) for name in acknowledged} == acknowledged
    check_against_log(arena_of(shard), log)
    shard.close()
