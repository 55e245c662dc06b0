"""Checksums: one event and many are the same, and no small change is missed."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlong.server.store.checksum import event_checksum, event_checksums_fit

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


def fit(rows: list[tuple[Any, ...]], checksums: list[bytes]) -> bool:
    return event_checksums_fit(*zip(*rows, strict=True), checksums)


@given(st.lists(ROWS, min_size=1, max_size=8))
def test_many_are_as_one(rows: list[tuple[Any, ...]]) -> None:
    checksums = [event_checksum(*row) for row in rows]
    assert fit(rows, checksums)
    wrong = bytes([checksums[-1][0] ^ 1]) + checksums[-1][1:]
    assert not fit(rows, [*checksums[:-1], wrong])


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
    assert not fit([tuple(other)], [event_checksum(*row)])


def test_ids_that_change_places_or_kinds_are_seen() -> None:
    base = (1, bytes(16), "a", "b", 0, "")
    assert event_checksum(*base) != event_checksum(1, bytes(16), "b", "a", 0, "")
    assert event_checksum(1, bytes(16), 5, 7, 0, "") != event_checksum(1, bytes(16), "5", 7, 0, "")


@pytest.mark.parametrize(
    "row",
    [
        (1.0, bytes(16), "a", "b", 0, ""),
        (1, "text", "a", "b", 0, ""),
        (1, bytes(15), "a", "b", 0, ""),
        (1, bytes(16), None, "b", 0, ""),
        (1, bytes(16), b"a", "b", 0, ""),
        (1, bytes(16), "a", 1.5, 0, ""),
        (1, bytes(16), "a", "b", None, ""),
        (1, bytes(16), "a", "b", 0, None),
    ],
)
def test_values_of_no_kind_known(row: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, struct.error)):
        event_checksum(*row)
    good = (2, bytes(16), "a", "b", 0, "")
    sums = [event_checksum(*good)] * 2
    # as many rows this is an answer, not an error
    assert not fit([good, row], sums)
