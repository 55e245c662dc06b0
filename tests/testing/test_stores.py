"""The conformance suites: the built-in implementations pass, and faults are found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from everlong.models.state import State
from everlong.server.store.log import Event, Id, Receipt
from everlong.server.store.sqlite_log import SqliteLog
from everlong.server.store.sqlite_states import SqliteStates
from everlong.server.store.state_codec import BFloat16, Float32, Int8, StateCodec
from everlong.server.store.state_store import Mark
from everlong.testing.contract import ContractBroken
from everlong.testing.event_log import check_event_log
from everlong.testing.state_codec import check_state_codec
from everlong.testing.state_store import check_state_store


@pytest.mark.parametrize("seed", range(4))
def test_the_log_passes(tmp_path: Path, seed: int) -> None:
    check_event_log(lambda folder: SqliteLog(folder / "log.sqlite"), tmp_path, seed=seed)


class Forgetful(SqliteLog):
    """Gives the offsets of erased events again."""

    def erase(self, user_id: Id) -> int:
        count = super().erase(user_id)
        rows = self.after(0, 1 << 40)
        self.total = self.total._replace(last=rows[-1].offset if rows else 0)
        self._put_total(self.total, self._sum)
        return count


class Eager(SqliteLog):
    """Says of an event that came twice at once that it is new both times."""

    def append(self, events: Sequence[Event]) -> list[Receipt]:
        receipts = super().append(events)
        return [Receipt(one.offset, one.offset > 0) for one in receipts]


class Confused(SqliteLog):
    """Takes the number 1 and the text "1" for one user."""

    def of_user(self, user_id: Id) -> list:  # type: ignore[type-arg]
        other = int(user_id) if user_id == "1" else user_id
        return super().of_user(other)


@pytest.mark.parametrize(
    ("faulty", "words"),
    [(Forgetful, "total|receipts"), (Eager, "receipts"), (Confused, "of_user")],
)
def test_a_faulty_log_is_found(tmp_path: Path, faulty: type[SqliteLog], words: str) -> None:
    with pytest.raises(ContractBroken, match=words):
        check_event_log(lambda folder: faulty(folder / "log.sqlite"), tmp_path)


@contextmanager
def sqlite_states(folder: Path) -> Iterator[SqliteStates]:
    with closing(SqliteLog(folder / "log.sqlite")) as log:
        yield SqliteStates(log)


@pytest.mark.parametrize("seed", range(4))
def test_the_store_passes(tmp_path: Path, seed: int) -> None:
    check_state_store(sqlite_states, tmp_path, seed=seed)


class Lasting(SqliteStates):
    """Erases from one model alone."""

    def erase(self, user_id: Id) -> None:
        for model in sorted(self.models())[:1]:
            left = [(u, r) for some in self.records(model, 99) for u, r in some if u != user_id]
            mark = self.mark(model)
            while self.delete_some(model):
                pass
            self.write(model, left, mark)


class Careless(SqliteStates):
    """Loses whether a table was complete."""

    def mark(self, model: str) -> Mark | None:
        found = super().mark(model)
        return None if found is None else Mark(found.offset, True)


@pytest.mark.parametrize(("faulty", "words"), [(Lasting, "records"), (Careless, "mark")])
def test_a_faulty_store_is_found(tmp_path: Path, faulty: type[SqliteStates], words: str) -> None:
    @contextmanager
    def opened(folder: Path) -> Iterator[SqliteStates]:
        with closing(SqliteLog(folder / "log.sqlite")) as log:
            yield faulty(log)

    with pytest.raises(ContractBroken, match=words):
        check_state_store(opened, tmp_path)


@pytest.mark.parametrize(
    ("codec", "error"), [(Float32(), 0.0), (BFloat16(), 2**-8), (Int8(), 1 / 254 + 1e-6)]
)
def test_the_codecs_pass(codec: StateCodec, error: float) -> None:
    worst = check_state_codec(codec, error=error)
    assert worst == 0.0 or worst > error / 4


class Rounded(Float32):
    """Rounds places and times too."""

    def encode(self, state: State) -> np.ndarray:
        return super().encode(type(state)(*(value.float().to(value.dtype) for value in state)))


class Wrong(Int8):
    """Is not distinguished from a codec of another name, and of no length that a record has."""

    name = "a very long name"


@pytest.mark.parametrize(
    ("codec", "error", "words"),
    [
        (Rounded(), 0.0, "error|same bits"),
        (Wrong(), 1.0, "name"),
        (Int8(), 1e-3, "at most 0.001"),
    ],
)
def test_a_faulty_codec_is_found(codec: StateCodec, error: float, words: str) -> None:
    with pytest.raises(ContractBroken, match=words):
        check_state_codec(codec, error=error)
