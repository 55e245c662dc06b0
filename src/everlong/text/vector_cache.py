"""The vector cache: vectors of texts in a SQLite file, so that each text is encoded once.

The key of a vector is the digest of its encoder and the sha256 of its text. Several encoders and
processes may share a file. Deleting it is safe.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from everlong.system.formats import Upgraded, check_version, migrate
from everlong.system.progress import Progress
from everlong.text.encoder import Encoded, TextEncoder

CHUNK = 512
"""Texts that are encoded between two commits."""

LOOKUP = 500
"""Keys of a query; older versions of SQLite allow 999 parameters."""

WAIT_S = 60.0
"""Seconds to wait for the write lock of another process."""

APPLICATION = 0x45764C56
"""The SQLite application id of a vector cache."""

KIND = "a cache of vectors"

TABLE = """
CREATE TABLE IF NOT EXISTS vectors (
    encoder BLOB NOT NULL, text BLOB NOT NULL, cut INTEGER NOT NULL, vector BLOB NOT NULL,
    checksum INTEGER NOT NULL, PRIMARY KEY (encoder, text)
)
"""

logger = logging.getLogger(__name__)


def _version_2(database: sqlite3.Connection) -> sqlite3.Connection:
    """Says its version; the table is that of version 1."""
    return database


MIGRATIONS: tuple[Callable[[sqlite3.Connection], sqlite3.Connection], ...] = (_version_2,)
"""From each version of the file to the next, inside one transaction."""

FORMAT = len(MIGRATIONS) + 1


class CachedVector(NamedTuple):
    """A vector ``[V]`` float32 and whether its text was truncated."""

    vector: np.ndarray
    cut: bool


def encode_cached(encoder: TextEncoder, texts: Sequence[str], cache: Path | None) -> Encoded:
    """Encodes ``n`` texts; each distinct text is read from the cache or encoded once.

    Vectors are committed chunk by chunk, so that an interrupted run can continue.

    Args:
        encoder: the text encoder.
        texts: the texts, with or without duplicates.
        cache: the file of the cache, created if it does not exist; None for no cache.

    Raises:
        ValueError: if the file is damaged or not a vector cache, or the encoder returns vectors
            that are not finite or have another width.
    """
    unique = list(dict.fromkeys(texts))
    if cache is None:
        found = _encoded(encoder, unique)
        logger.info("encoded %d texts of %d", len(unique), len(texts))
    else:
        with _opened(cache) as database:
            encoder_key = bytes.fromhex(encoder.digest)
            found = _look_up(database, encoder_key, unique, encoder.width)
            missing = [text for text in unique if text not in found]
            logger.info("%d vectors found in %s, %d to encode", len(found), cache, len(missing))
            found |= _encoded(encoder, missing, database, encoder_key)
    vectors = np.zeros((len(texts), encoder.width), np.float32)
    for row, text in enumerate(texts):
        vectors[row] = found[text].vector
    return Encoded(vectors=vectors, cut=np.array([found[text].cut for text in texts], np.bool_))


def _encoded(
    encoder: TextEncoder,
    texts: Sequence[str],
    database: sqlite3.Connection | None = None,
    encoder_key: bytes = b"",
) -> dict[str, CachedVector]:
    found: dict[str, CachedVector] = {}
    with Progress("encode", len(texts), "texts") as progress:
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            encoded = encoder.encode(part, progress=progress)
            _check(encoded, part, encoder.width)
            new = {
                text: CachedVector(vector, bool(cut))
                for text, vector, cut in zip(part, encoded.vectors, encoded.cut, strict=True)
            }
            if database is not None:
                _keep(database, encoder_key, new)
            found |= new
    return found


def _check(encoded: Encoded, texts: Sequence[str], width: int) -> None:
    expected = (len(texts), width)
    if encoded.vectors.shape != expected:
        raise ValueError(
            f"expected vectors of shape {expected} from the encoder, received "
            f"{encoded.vectors.shape}"
        )
    finite = np.isfinite(encoded.vectors).all(1)
    if not finite.all():
        text = texts[int(np.flatnonzero(~finite)[0])]
        raise ValueError(
            "expected finite vectors from the encoder, received NaN or infinity for "
            f"{int((~finite).sum())} texts, for example {text[:80]!r}; try dtype float32, or an "
            "encoder that has not diverged"
        )


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_S)) as database:
            _claim(path, database)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            yield database
    except sqlite3.OperationalError as error:
        raise ValueError(
            f"the cache {path} cannot be used: {error}; choose another file or try again later"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path} is not a vector cache, or is damaged: {error}; choose another file, or delete "
            "it to encode all texts again"
        ) from error


def is_vector_cache(path: Path) -> bool:
    """Whether a file is a cache of vectors, by its header."""
    with path.open("rb") as file:
        header = file.read(72)
    return header[:16] == b"SQLite format 3\0" and header[68:] == APPLICATION.to_bytes(4, "big")


def upgrade_vector_cache(path: Path) -> Upgraded:
    """Brings a cache of vectors up to this version.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        ValueError: if it is something else, or cannot be written; then it is as before.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=WAIT_S)) as database:
            found = _version_of(path, database)
            _claim(path, database)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be brought up: {error}") from error
    return Upgraded(KIND, found, FORMAT)


def _version_of(path: Path, database: sqlite3.Connection) -> int:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    # the first version left it at 0
    return check_version(path, KIND, max(1, found), FORMAT)


def _claim(path: Path, database: sqlite3.Connection) -> None:
    """Makes the table in a new file, or brings up an old one.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        sqlite3.DatabaseError: if another program did.
    """
    with database:
        # take the write lock before reading, because two processes may open an empty file
        database.execute("BEGIN IMMEDIATE")
        (owner,) = database.execute("PRAGMA application_id").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner == 0 and tables == 0:
            database.execute(f"PRAGMA application_id = {APPLICATION}")
        elif owner != APPLICATION:
            raise sqlite3.DatabaseError("it contains tables of another program")
        database.execute(TABLE)
        found = _version_of(path, database)
        if found < FORMAT:
            migrate(database, found, MIGRATIONS)
            database.execute(f"PRAGMA user_version = {FORMAT}")


def _look_up(
    database: sqlite3.Connection, encoder_key: bytes, texts: Sequence[str], width: int
) -> dict[str, CachedVector]:
    """Reads the cached vectors of texts; skips rows with a wrong checksum."""
    found: dict[str, CachedVector] = {}
    damaged = 0
    for start in range(0, len(texts), LOOKUP):
        by_key = {_text_key(text): text for text in texts[start : start + LOOKUP]}
        marks = ", ".join("?" * len(by_key))
        query = f"SELECT text, cut, vector, checksum FROM vectors WHERE encoder = ? AND text IN ({marks})"  # noqa: S608, E501
        for key, cut, vector, checksum in database.execute(query, (encoder_key, *by_key)):
            whole = isinstance(vector, bytes) and len(vector) == 4 * width
            if not whole or checksum != _checksum(encoder_key, key, cut, vector):
                damaged += 1
                continue
            found[by_key[key]] = CachedVector(np.frombuffer(vector, "<f4"), bool(cut))
    if damaged:
        logger.warning("%d vectors of the cache are damaged: encoded again", damaged)
    return found


def _keep(database: sqlite3.Connection, encoder_key: bytes, new: dict[str, CachedVector]) -> None:
    rows = []
    for text, (vector, cut) in new.items():
        key, data = _text_key(text), np.ascontiguousarray(vector, "<f4").tobytes()
        rows.append((encoder_key, key, int(cut), data, _checksum(encoder_key, key, cut, data)))
    with database:
        database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)", rows)


def _text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _checksum(encoder_key: bytes, text_key: bytes, cut: int, vector: bytes) -> int:
    return zlib.crc32(encoder_key + text_key + bytes([bool(cut)]) + vector)
