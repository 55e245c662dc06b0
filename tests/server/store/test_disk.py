"""A disk that is full or read-only: nothing is acknowledged that is not there, nothing doubles."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.server_writer import check_against_log, opened

from everlong.server.engine.shard import Shard
from everlong.server.store.log import Event
from everlong.server.store.sqlite_log import SqliteLog, SqliteReader

SMALL = 1 << 21
"""Bytes that the disk has."""


@pytest.fixture(autouse=True)
def _no_moves_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the writer moves events from the write-ahead log into the file.

    While a thread beside it does, the writer cannot settle and refuses a group for a moment, though
    the disk has room: a refusal would not say that the disk is full.
    """
    monkeypatch.setattr("everlong.server.store.wal_flusher.FLUSH_S", 1e6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("file systems can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def group(number: int) -> list[Event]:
    names = [f"{number}-{n}" for n in range(40)]
    return [Event(name, f"u{n % 9}", n, 1_000 * number + n) for n, name in enumerate(names)]


def fill(shard: Shard, told: dict[str, int]) -> int:
    """Sends groups until one is refused again and again; returns which one."""
    for number in range(10_000):
        # once refused, what was written is moved out of the write-ahead log, which makes room
        for _ in range(4):
            try:
                receipts = shard.submit(group(number)).result()
                break
            except OSError:
                continue
        else:
            return number
        for event, receipt in zip(group(number), receipts, strict=True):
            assert receipt.new
            told[event.event_id] = receipt.offset
    raise AssertionError("the disk did not fill")


def check_full(folder: Path, free: Callable[[], object]) -> None:
    path, told = folder / "shard.sqlite", dict[str, int]()
    shard = opened(path)
    try:
        refused = fill(shard, told)
        assert refused > 1
        for _ in range(3):
            assert not shard.writable
            with pytest.raises(OSError, match="cannot be written"):
                shard.submit(group(refused)).result()
        # what is there can still be read, and what was refused is not there
        assert shard.log.total.events == len(told)
        (states,) = shard.tables.values()
        assert check_against_log(states, shard.log) == len(told)
        with closing(SqliteReader(path)) as beside:
            assert beside.verify() == len(told)
        free()
        # it is ready again without a further request
        until = time.monotonic() + 60
        while not shard.writable and time.monotonic() < until:
            time.sleep(0.01)
        assert shard.writable
        again = shard.submit([*group(refused), *group(0)]).result()
        assert [receipt.new for receipt in again] == [True] * 40 + [False] * 40
        check_against_log(states, shard.log)
    finally:
        shard.close()
    with closing(SqliteLog(path)) as log:
        assert log.verify() == len(told) + 40
        offset_of = {event.event_key: event.offset for event in log.after(0, 10**6)}
        assert all(offset_of[log.key_of(name)] == offset for name, offset in told.items())


def test_a_full_disk(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(SMALL // 2))
    check_full(small_disk, ballast.unlink)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL // 2, before[1]))
    try:
        check_full(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_a_user_is_erased(small_disk: Path) -> None:
    path = small_disk / "shard.sqlite"
    shard = opened(path)
    fill(shard, {})
    (states,) = shard.tables.values()
    try:
        gone = shard.erase("u1").result()
    except OSError:
        # then all of the user is there
        assert states.watermark("u1") is not None
    else:
        assert gone > 0
        assert states.watermark("u1") is None
    check_against_log(states, shard.log)
    shard.log.verify()
    shard.close()


def test_a_read_only_disk_raises(small_disk: Path) -> None:
    path = small_disk / "shard.sqlite"
    with closing(SqliteLog(path)) as log:
        log.append(group(0))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"cannot be|Read-only"):
        SqliteLog(path)
    with pytest.raises(OSError, match="Read-only"):
        SqliteLog(small_disk / "new" / "shard.sqlite")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with closing(SqliteLog(path)) as log:
        assert log.verify() == 40


@pytest.mark.skipif(os.getuid() == 0, reason="root may write what is read-only")
def test_a_read_only_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "shard.sqlite"
    with closing(SqliteLog(path)) as log:
        log.append(group(0))
    path.chmod(0o400)
    with pytest.raises(OSError, match="cannot be"):
        SqliteLog(path).append(group(1))
    path.chmod(0o600)
    with closing(SqliteLog(path)) as log:
        assert log.verify() == 40
