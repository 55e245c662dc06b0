"""The record of a user's state: how far the state goes, the state, and a checksum of both.

A record says its version, the codec of the state, and the model. One of an earlier version is read
as it is; it is written anew when the state changes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

from xxhash import xxh3_128_digest

from everlong.server.store.log import DamagedError, Id
from everlong.server.store.watermark import Watermark
from everlong.system.formats import NewerFormatError, migrate

MAGIC = b"elst"
HEAD = struct.Struct("<4sI")
HEADER = struct.Struct("<4sI8s16sqqQq")
"""Magic, version, codec and model; then the watermark: last offset, events, chain, newest time."""

CHECKSUM = 16


class Record(NamedTuple):
    """What a record says."""

    codec: str
    model: bytes
    """16 bytes that stand for all that a state depends on."""
    watermark: Watermark
    state: bytes
    """As the codec encodes it."""


def pack_record(record: Record, user_id: Id) -> bytes:
    """The bytes of a record, which belong to this user alone."""
    name = record.codec.encode()
    header = HEADER.pack(MAGIC, VERSION, name, record.model, *record.watermark)
    return _sealed(header + record.state, user_id)


def unpack_record(data: bytes, user_id: Id) -> Record:
    """The record of a user.

    Raises:
        DamagedError: if it is not what was written, or of another user.
        NewerFormatError: if a later version of everlong wrote it.
    """
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise DamagedError("a state record is not what was written; rebuild the state from the log")
    _, version = HEAD.unpack_from(data)
    if version > VERSION:
        raise NewerFormatError(
            f"a state record has version {version}; this everlong reads versions up to {VERSION}: "
            "install a later everlong"
        )
    data, _ = migrate((data, user_id), max(version, 1), MIGRATIONS)
    body = data[:-CHECKSUM]
    if len(body) < HEADER.size or _sealed(body, user_id) != data:
        raise DamagedError("a state record is not what was written; rebuild the state from the log")
    _, _, name, model, *watermark = HEADER.unpack_from(body)
    codec = name.rstrip(b"\0").decode(errors="replace")
    return Record(codec, model, Watermark(*watermark), body[HEADER.size :])


def _sealed(body: bytes, user_id: Id) -> bytes:
    return body + xxh3_128_digest(repr(user_id).encode() + body)


def _version_2(stored: tuple[bytes, Id]) -> tuple[bytes, Id]:
    """Names the codec, drops the hash that did not depend on order, and has another checksum."""
    data, user_id = stored
    header = struct.Struct("<4sI16sqqQQq")
    body = data[:-16]
    seal = blake2b(repr(user_id).encode() + body, digest_size=16).digest()
    if len(body) < header.size or data[-16:] != seal:
        raise DamagedError("a state record is not what was written; rebuild the state from the log")
    magic, _, model, offset, events, chain, _, newest = header.unpack_from(body)
    new = HEADER.pack(magic, 2, b"float32", model, offset, events, chain, newest)
    return _sealed(new + body[header.size :], user_id), user_id


MIGRATIONS: tuple[Callable[[tuple[bytes, Id]], tuple[bytes, Id]], ...] = (_version_2,)

VERSION = len(MIGRATIONS) + 1
