"""Checksums: no change of a row is missed, and values of other kinds are refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlong.server.store.checksum import checksum, event_checksum

INTS = st.integers(-(1 << 63), (1 << 63) - 1)
IDS = st.one_of(INTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
ROWS = st.tuples(
    st.integers(1, (1 << 63) - 1),
    st.binary(min_size=16, max_size=16),
    IDS,
    IDS,
    INTS,
    st.sampled_from(["", '{"price":3}']),
)


@given(ROWS, ROWS)
def test_two_rows_have_one_checksum_only_if_they_are_equal(
    one: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    assert (event_checksum(*one) == event_checksum(*other)) == (one == other)


@given(ROWS, st.data())
def test_a_bit_that_flips_is_seen(row: tuple[Any, ...], data: st.DataObject) -> None:
    field = data.draw(st.integers(0, 5))
    value = row[field]
    if isinstance(value, int):
        bits = value & ((1 << 64) - 1) ^ (1 << data.draw(st.integers(0, 62)))
        changed: Any = struct.unpack("<q", struct.pack("<Q", bits))[0]
    elif isinstance(value, bytes):
        place = data.draw(st.integers(0, len(value) - 1))
        flipped = value[place] ^ (1 << data.draw(st.integers(0, 7)))
        changed = value[:place] + bytes([flipped]) + value[place + 1 :]
    else:
        changed = value + "x"
    other = [*row[:field], changed, *row[field + 1 :]]
    assert event_checksum(*other) != event_checksum(*row)


def test_ids_that_change_places_or_kinds_are_seen() -> None:
    rows = [
        (1, bytes(16), "a", "b", 0, ""),
        (1, bytes(16), "b", "a", 0, ""),
        (1, bytes(16), 5, 7, 0, ""),
        (1, bytes(16), "5", 7, 0, ""),
        (1, bytes(16), "5,7", 7, 0, ""),
        (1, bytes(16), "a', 'b", "c", 0, ""),
        (1, bytes(16), "a", "b', 'c", 0, ""),
        # as a file has them whose bits have flipped
        (1, bytes(16), None, "b", 0, ""),
        (1, bytes(16), b"a", "b", 0, ""),
        (1, bytes(16), "a", 1.5, 0, ""),
        (1, bytes(17), "a", "b", 0, ""),
        (1, bytes(15), "a", "b", 0, ""),
        (1, bytes(16), "a", "b", 0, None),
    ]
    assert len({event_checksum(*row) for row in rows}) == len(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "row",
    [
        (1.0, bytes(16), "a", "b", 0, ""),
        (1, "text", "a", "b", 0, ""),
        (1, bytes(16), "a", "b", None, ""),
    ],
)
def test_values_of_no_kind_known(row: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, struct.error)):
        event_checksum(*row)


def test_different_values_of_facts_have_different_checksums() -> None:
    assert checksum("a", b"bc") != checksum("ab", b"c")
    assert checksum("a", b"bc") == checksum("a", b"bc")
