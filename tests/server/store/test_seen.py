"""What users have seen: what the log says, whatever was kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.ids import IdMap
from everlong.server.store.log import Event
from everlong.server.store.seen import ROWS_EACH, Seen
from everlong.server.store.sqlite_log import SqliteLog

CATALOGUE = IdMap(pl.Series([f"i{number:02d}" for number in range(20)]))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    written = SqliteLog(tmp_path / "log.sqlite")
    yield written
    written.close()


def append(log: SqliteLog, user: str, *items: int) -> None:
    first = log.total.last
    log.append([Event(f"{first + n}", user, f"i{item:02d}", 0) for n, item in enumerate(items)])


def rows(seen: Seen, user: str) -> list[int]:
    return [int(row) for row in seen.rows(user, CATALOGUE)]


def test_what_comes_later_is_added_in_its_place(log: SqliteLog) -> None:
    seen = Seen(lambda _: log)
    assert rows(seen, "a") == []
    append(log, "a", 7, 3, 7)
    append(log, "b", 1)
    assert rows(seen, "a") == [3, 7]
    append(log, "a", 5, 3, 19, 0, 99)
    assert rows(seen, "a") == [0, 3, 5, 7, 19]
    assert rows(seen, "b") == [1]
    seen.close()


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.sampled_from("ab"), st.lists(st.integers(0, 24))),
            st.tuples(st.just("erase"), st.sampled_from("ab"), st.none()),
            st.tuples(st.just("ask"), st.sampled_from("ab"), st.none()),
        ),
        max_size=25,
    ),
    capacity=st.sampled_from([1, 60, 1_000]),
)
def test_it_is_what_the_log_says(
    steps: list[Any], capacity: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = SqliteLog(tmp_path_factory.mktemp("seen") / "log.sqlite")
    seen = Seen(lambda _: log, capacity=capacity)
    try:
        for step, user, items in steps:
            if step == "append" and items:
                append(log, user, *items)
            elif step == "erase":
                log.erase(user)
                seen.forget(user)
            found = seen.rows(user, CATALOGUE)
            stored = {int(str(event.item_id)[1:]) for event in log.of_user(user)}
            assert found.tolist() == sorted(item for item in stored if item < 20)
            assert found.dtype == np.int64
    finally:
        seen.close()
        log.close()


def test_rows_are_those_of_the_catalogue_that_asks(log: SqliteLog) -> None:
    seen = Seen(lambda _: log)
    append(log, "a", 7, 3)
    assert rows(seen, "a") == [3, 7]
    other = IdMap(pl.Series(["i07", "i30"]))
    assert seen.rows("a", other).tolist() == [0]
    assert rows(seen, "a") == [3, 7]
    seen.close()


def test_no_more_is_kept_than_is_allowed(log: SqliteLog) -> None:
    seen = Seen(lambda _: log, capacity=2 * (ROWS_EACH + 2) + 1)
    for user in "abc":
        append(log, user, 1, 2)
        rows(seen, user)
    # the user of the oldest request is evicted first
    assert list(seen._kept) == ["b", "c"]
    # nothing is kept of users without events
    for number in range(9):
        assert rows(seen, f"stranger{number}") == []
    assert list(seen._kept) == ["b", "c"]
    append(log, "d", *range(8))
    assert len(rows(seen, "d")) == 8
    assert list(seen._kept) == ["d"]
    assert rows(seen, "a") == [1, 2]
    seen.close()


def test_a_user_erased_during_the_read_is_not_kept(log: SqliteLog) -> None:
    append(log, "a", 1, 2)
    seen = Seen(lambda _: log)
    reading = seen._log("a")

    class Slow:
        """The log of a user that is erased between the read and the insertion."""

        def items_of_user(self, user: str, after: int) -> list[tuple[int, Any]]:
            found = reading.items_of_user(user, after)
            log.erase("a")
            seen.forget("a")
            return found

    seen._logs[log] = Slow()  # type: ignore[assignment]
    assert rows(seen, "a") == [1, 2]
    assert len(seen) == 0
    seen._logs[log] = reading
    assert rows(seen, "a") == []
    seen.close()
