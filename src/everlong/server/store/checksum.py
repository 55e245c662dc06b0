"""Checksums of what is stored: of anything, and of events, of which there are many.

That of an event is plain arithmetic on words of 64 bits, the same for one event and for arrays of
them. Each step can be undone, so that a change of one word alone is never missed; a number is its
own word, of a text it is CRC-32, which misses no change of up to 32 bits in a row. It is against
accidents; who can write to the file can write a checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from zlib import crc32

import numpy as np

FACTOR, MASK, TEXT = 0x9E3779B97F4A7C15, (1 << 64) - 1, 1 << 32

Value = int | str


def checksum(*values: object) -> bytes:
    """8 bytes that stand for values of any kind."""
    return blake2b(repr(values).encode(), digest_size=8).digest()


def event_checksum(
    offset: int, key: bytes, user_id: Value, item_id: Value, time: int, fields: str
) -> bytes:
    """8 bytes that stand for a row of the log.

    Raises:
        TypeError, struct.error: if a value is of another kind than those in a log.
    """
    found, ids = 0, (_word(user_id), _word(item_id))
    for word in (offset & MASK, *struct.unpack("<QQ", key), time & MASK, *ids, _word(fields)):
        found = (found ^ word) * FACTOR & MASK
        found ^= found >> 32
    return found.to_bytes(8, "little")


def event_checksums_fit(
    offsets: Sequence[int],
    keys: Sequence[bytes],
    user_ids: Sequence[Value],
    item_ids: Sequence[Value],
    times: Sequence[int],
    fields: Sequence[str],
    checksums: Sequence[bytes],
) -> bool:
    """Whether checksums are what ``event_checksum`` says of each event."""
    if not (
        _kinds(offsets, times) == {int}
        and _kinds(keys, checksums) == {bytes}
        and _kinds(user_ids, item_ids, fields) <= {int, str}
        and set(map(len, keys)) == {16}
        and set(map(len, checksums)) == {8}
    ):
        return False
    halves = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    ids = _words(user_ids), _words(item_ids)
    found = np.zeros(len(offsets), dtype=np.uint64)
    for word in (_words(offsets), halves[:, 0], halves[:, 1], _words(times), *ids, _words(fields)):
        found = (found ^ word) * np.uint64(FACTOR)
        found ^= found >> np.uint64(32)
    return found.astype("<u8").tobytes() == b"".join(checksums)


def _words(values: Sequence[Value]) -> np.ndarray:
    """As ``_word`` of each, ``[n]`` uint64."""
    kinds = _kinds(values)
    if kinds == {int}:
        return np.array(values, dtype=np.int64).view(np.uint64)
    if kinds == {str} and not any(values):
        return np.full(len(values), _word(""), dtype=np.uint64)
    if kinds == {str}:
        found: Iterable[int] = map(crc32, map(str.encode, values))  # type: ignore[arg-type]
        return np.fromiter(found, dtype=np.uint64, count=len(values)) + np.uint64(TEXT)
    return np.fromiter(map(_word, values), dtype=np.uint64, count=len(values))


def _kinds(*columns: Sequence[object]) -> set[type]:
    return {kind for values in columns for kind in set(map(type, values))}


def _word(value: Value) -> int:
    if isinstance(value, str):
        return crc32(value.encode()) + TEXT
    return value & MASK
