"""After a power cut everything that was acknowledged is on the disk.

SQLite runs over a file system that records what it writes and what it makes durable. For a cut at
any point the disk is built anew: what was durable is whole, and of the rest every sector of 512
bytes is as it was, as it became, something between, or garbage. The log that is used in service
opens that disk.
"""

from __future__ import annotations

import copy
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.forms import forms

from everlong.server.store.log import DamagedError, Event
from everlong.server.store.sqlite_log import SqliteLog
from everlong.server.store.sqlite_states import SqliteStates
from everlong.server.store.state_store import Mark

apsw = pytest.importorskip("apsw")

SECTOR, VFS_NAME = 512, "recorded"
JOURNAL = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL


class Write(NamedTuple):
    """Bytes at a place in a file that SQLite opened under a number."""

    file: int
    offset: int
    data: bytes


class Cut(NamedTuple):
    """A file that got so many bytes."""

    file: int
    size: int


class Sync(NamedTuple):
    """A file whose bytes are durable from here, and with ``names`` those of its folder."""

    file: int
    names: bool


class Name(NamedTuple):
    """A name in the folder that stands for a file from here; for none if it was removed."""

    name: str
    file: int | None


@dataclass
class Tape:
    """What went to the disk, in order."""

    acts: list[Write | Cut | Sync | Name] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    failing: bool = False
    """Whether nothing can be made durable."""


class RecordedFile(apsw.VFSFile):
    """A file whose changes are recorded."""

    def __init__(self, tape: Tape, name: Any, flags: list[int]) -> None:
        path = name if isinstance(name, str) else name.filename()
        self.tape, base = tape, Path(path).name
        self.number = tape.names.get(base, -1)
        # SQLite makes the name of a journal durable when it first makes its bytes durable
        self.names = self.number < 0 and bool(flags[0] & JOURNAL)
        if self.number < 0:
            self.number = len(tape.acts)
            tape.names[base] = self.number
            tape.acts.append(Name(base, self.number))
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.tape.acts.append(Write(self.number, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self.tape.acts.append(Cut(self.number, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self.tape.failing:
            raise apsw.IOError("the disk does not answer")
        super().xSync(flags)
        self.tape.acts.append(Sync(self.number, self.names))
        self.names = False


class RecordedFolder(apsw.VFS):
    """A file system that records onto a tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        super().__init__(VFS_NAME, "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
        if not flags[0] & (JOURNAL | apsw.SQLITE_OPEN_MAIN_DB):
            # of one statement, never read again
            return apsw.VFSFile("", name, flags)
        return RecordedFile(self.tape, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        super().xDelete(name, sync)
        self.tape.acts.append(Name(Path(name).name, None))
        self.tape.names.pop(Path(name).name)
        if sync:
            self.tape.acts.append(Sync(-1, True))


class Answer:
    """A cursor as the log knows it."""

    def __init__(self, rows: Any, rowcount: int) -> None:
        self.rows, self.rowcount = rows, rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def fetchone(self) -> Any:
        return next(self.rows, None)

    def fetchall(self) -> list[Any]:
        return list(self.rows)


class Connection:
    """A connection over the recorded file system as the log knows it."""

    def __init__(self, path: Path) -> None:
        self.inner = apsw.Connection(str(path), vfs=VFS_NAME)
        # without it there would be shared memory, which is no part of the disk
        self.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Answer:
        try:
            return Answer(self.inner.execute(statement, values), self.inner.changes())
        except apsw.IOError as error:
            known = sqlite3.OperationalError(str(error))
            known.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise known from error

    def executemany(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            self.execute(statement, row)

    @property
    def in_transaction(self) -> bool:
        return bool(self.inner.in_transaction)

    def close(self) -> None:
        self.inner.close()


class Known(NamedTuple):
    """What a log holds."""

    offsets: dict[str, int]
    erased: frozenset[str]
    states: dict[str, bytes]
    mark: Mark | None


@dataclass
class Story:
    """What was done to a log, and when each step was acknowledged."""

    tape: Tape
    steps: list[tuple[int, Known]]
    """So many acts were on the tape when the log was asked to hold that."""
    events: dict[str, Event]
    certain: list[int]
    """Steps that are on the disk when they are over, with all before them."""


@contextmanager
def recorded() -> Iterator[Tape]:
    tape = Tape()
    folder = RecordedFolder(tape)
    yield tape
    folder.unregister()


def story(path: Path, seed: int, *, synchronous: str = "FULL", length: int = 60) -> Story:
    """Appends, repeats, states, checkpoints, erasures and restarts at random.

    States are written without waiting for the disk.
    """
    draw = random.Random(seed)
    with recorded() as tape:
        found = Story(tape, [(0, Known({}, frozenset(), {}, None))], {}, [0])
        log = _opened(path, synchronous)
        for step in range(length):
            known, certain = copy.deepcopy(found.steps[-1][1]), True
            match draw.choices(range(5), [12, 3, 2, 1, 1])[0]:
                case 0:
                    certain = _append(log, draw, found, known, step)
                case 1:
                    known, certain = _write_states(log, draw, known, step), False
                    log.file.connection.execute(f"PRAGMA synchronous={synchronous}")
                case 2:
                    log.checkpoint()
                case 3:
                    known = _erase(log, draw, found, known)
                case 4:
                    log.close()
                    log = _opened(path, synchronous)
            found.steps.append((len(tape.acts), known))
            if certain:
                found.certain.append(len(found.steps) - 1)
        log.close()
    return found


def _opened(path: Path, synchronous: str) -> SqliteLog:
    log = SqliteLog(path, connect=Connection)  # type: ignore[arg-type]
    log.file.connection.execute(f"PRAGMA synchronous={synchronous}")
    return log


def _append(log: SqliteLog, draw: random.Random, found: Story, known: Known, step: int) -> bool:
    """Whether anything was new; else nothing was written."""
    group = [
        Event(f"{step}-{n}", f"u{draw.randrange(6)}", n, step, {"x": n} if n % 3 else {})
        for n in range(draw.choice([1, 3, 150]))
    ]
    group += draw.sample(list(found.events.values()), min(3, len(found.events)))
    news = False
    for event, receipt in zip(group, log.append(group), strict=True):
        found.events[event.event_id] = event
        if event.event_id not in known.erased:
            assert known.offsets.setdefault(event.event_id, receipt.offset) == receipt.offset
        news = news or receipt.new
    return news


def _write_states(log: SqliteLog, draw: random.Random, known: Known, step: int) -> Known:
    records = [(f"u{user}", draw.randbytes(draw.choice([80, 3_000]))) for user in range(6)]
    records = draw.sample(records, 3)
    mark = Mark(step, draw.random() < 0.5)
    SqliteStates(log).write("m", records, mark)
    return known._replace(states=known.states | dict(records), mark=mark)


def _erase(log: SqliteLog, draw: random.Random, found: Story, known: Known) -> Known:
    user = f"u{draw.randrange(6)}"
    SqliteStates(log).erase(user)
    states = {name: record for name, record in known.states.items() if name != user}
    known = known._replace(states=states)
    found.steps.append((len(found.tape.acts), known))
    log.erase(user)
    gone = {name for name in known.offsets if found.events[name].user_id == user}
    offsets = {name: offset for name, offset in known.offsets.items() if name not in gone}
    return known._replace(offsets=offsets, erased=known.erased | gone)


def disk_after(tape: Tape, cut: int, draw: random.Random) -> dict[str, bytes]:
    """Files of the folder if the power goes after so many acts."""
    names: dict[str, int] = {}
    files: dict[int, bytearray] = {}
    pending: dict[int, list[Write | Cut]] = {}
    pending_names: list[Name] = []
    for act in tape.acts[:cut]:
        match act:
            case Name():
                pending_names.append(act)
            case Sync():
                for one in pending.pop(act.file, ()):
                    _apply(files.setdefault(act.file, bytearray()), one)
                if act.names:
                    _rename(names, pending_names)
                    pending_names = []
            case _:
                pending.setdefault(act.file, []).append(act)
    # all lost, all there, or each sector as it happens
    luck = draw.choice([0.0, 1.0, 0.5, 0.5, 0.9])
    for number, acts in pending.items():
        _spoil(files.setdefault(number, bytearray()), acts, luck, draw)
    _rename(names, pending_names[: sum(draw.random() < luck for _ in pending_names)])
    return {name: bytes(files.get(number, b"")) for name, number in names.items()}


def _rename(names: dict[str, int], acts: Sequence[Name]) -> None:
    for act in acts:
        if act.file is None:
            names.pop(act.name, None)
        else:
            names[act.name] = act.file


def _apply(data: bytearray, act: Write | Cut) -> None:
    if isinstance(act, Cut):
        data[:] = data[: act.size].ljust(act.size, b"\0")
        return
    data.extend(bytes(max(0, act.offset - len(data))))
    data[act.offset : act.offset + len(act.data)] = act.data


def _spoil(data: bytearray, acts: Sequence[Write | Cut], luck: float, draw: random.Random) -> None:
    """What is on the disk of a file that was written and not made durable."""
    until: dict[int, float] = {}
    for n, act in enumerate(acts):
        if isinstance(act, Cut):
            if draw.random() < luck:
                _apply(data, act)
            continue
        end = act.offset + len(act.data)
        for sector in range(act.offset // SECTOR, -(-end // SECTOR)):
            # a sector is of one moment: once a write did not reach it, later ones did not either
            if sector not in until:
                until[sector] = len(acts) if draw.random() < luck else draw.randrange(len(acts))
            low, high = max(act.offset, sector * SECTOR), min(end, (sector + 1) * SECTOR)
            part = act.data[low - act.offset : high - act.offset]
            if n < until[sector]:
                _apply(data, Write(act.file, low, part))
            elif n == until[sector] and draw.random() < 0.2:
                _apply(data, Write(act.file, low, draw.randbytes(len(part))))


def check_disk(files: dict[str, bytes], folder: Path, told: Story, cut: int) -> None:
    """The log of a disk holds what was acknowledged, or that and what was about to be."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    log = SqliteLog(folder / "shard.sqlite")
    try:
        assert log.verify() == log.total.events
        name_of = {log.key_of(name): name for name in told.events}
        stored = {name_of[event.event_key]: event for event in log.after(0, 10**6)}
        for name, event in stored.items():
            whole = (event.user_id, event.item_id, event.time, dict(event.fields))
            own = told.events[name]
            assert whole == (own.user_id, own.item_id, own.time, dict(own.fields))
        run, states = log.file.connection.execute, SqliteStates(log)
        found = Known(
            {name: event.offset for name, event in stored.items()},
            frozenset(name_of[key] for (key,) in run("SELECT event_key FROM erased")),
            {user: record for some in states.records("m", 4) for user, record in some},
            states.mark("m"),
        )
        last = max(n for n, (acts, _) in enumerate(told.steps) if acts <= cut)
        certain = max(n for n in told.certain if n <= last)
        may = [known for _, known in told.steps[certain : last + 2]]
        assert found in may
        # and it goes on from there
        repeated = log.append([told.events[name] for name in found.offsets])
        assert [receipt.offset for receipt in repeated] == list(found.offsets.values())
        (receipt,) = log.append([Event("after the cut", "u0", 1, 1)])
        assert receipt.new
        log.verify()
    finally:
        log.close()


def cuts_of(told: Story, count: int, seed: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    draw = random.Random(seed)
    for _ in range(count):
        cut = draw.randrange(len(told.tape.acts) + 1)
        yield cut, disk_after(told.tape, cut, draw)


@pytest.mark.parametrize("cuts", forms("CUTS", "40", "200"))
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path, cuts: str) -> None:
    stories = max(2, int(cuts) // 50)
    for seed in range(stories):
        folder = tmp_path / str(seed)
        folder.mkdir()
        told = story(folder / "shard.sqlite", seed)
        for n, (cut, files) in enumerate(cuts_of(told, -(-int(cuts) // stories), seed)):
            check_disk(files, folder / f"cut-{n}", told, cut)


def test_without_syncs_it_is_lost(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    told = story(tmp_path / "first" / "shard.sqlite", 0, synchronous="OFF")
    lost = 0
    for n, (cut, files) in enumerate(cuts_of(told, 20, 0)):
        try:
            check_disk(files, tmp_path / f"cut-{n}", told, cut)
        except (AssertionError, DamagedError):
            lost += 1
    assert lost > 5


def test_what_was_refused_while_it_was_made_durable_is_known_when_it_comes_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "first").mkdir()
    first, group = [Event("a", 1, 1, 1)], [Event("b", 1, 2, 2), Event("c", 1, 3, 3)]
    with recorded() as tape:
        log = _opened(tmp_path / "first" / "shard.sqlite", "FULL")
        log.append(first)
        tape.failing = True
        with pytest.raises(OSError, match="cannot be written"):
            log.append(group)
        tape.failing = False
        refused = len(tape.acts)
        assert log.total.events == 1
        assert [event.offset for event in log.after(0, 10)] == [1]
        # without a crash it is not there, and is taken when it comes again
        receipts = log.append(group)
        assert [(receipt.offset, receipt.new) for receipt in receipts] == [(2, True), (3, True)]
        log.verify()
        log.close()
    found = set()
    for n in range(20):
        folder = tmp_path / f"cut-{n}"
        folder.mkdir()
        for name, data in disk_after(tape, refused, random.Random(n)).items():
            (folder / name).write_bytes(data)
        log = SqliteLog(folder / "shard.sqlite")
        found.add(log.verify())
        receipts = log.append([*first, *group])
        assert [receipt.offset for receipt in receipts] == [1, 2, 3]
        assert log.verify() == 3
        log.close()
    # after a crash it may be there: all of it, or nothing
    assert found == {1, 3}
