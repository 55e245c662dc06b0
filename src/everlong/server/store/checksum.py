"""Checksums against accidents: what can write to the file can write a checksum too."""

from __future__ import annotations

import struct

from xxhash import xxh3_64_digest

_NUMBERS = struct.Struct("<qq").pack


def checksum(*values: object) -> bytes:
    """8 bytes that stand for values of any kind."""
    return xxh3_64_digest(repr(values).encode())


def event_checksum(
    offset: int, key: bytes, user_id: int | str, item_id: int | str, time: int, fields: str
) -> bytes:
    """8 bytes that stand for a row of the log.

    Raises:
        TypeError, ValueError, struct.error: if a value is of another kind than those in a log.
    """
    # a quote ends each text, and is escaped inside it: no two rows have the same bytes
    texts = f"{user_id!r},{item_id!r},{fields}".encode()
    return xxh3_64_digest(_NUMBERS(offset, time) + key + texts)
