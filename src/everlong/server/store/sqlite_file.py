"""An SQLite file with named values that have checksums."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everlong.server.store.checksum import checksum
from everlong.server.store.log import DamagedError


class SqliteFile:
    """An open SQLite file with named values that have checksums.

    Args:
        path: the file.
        connection: to it, without transactions of its own.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self.connection = path, connection

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Errors of SQLite as those of the disk, or of what is on it."""
        with sqlite_errors(self.path, what):
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside reaches the disk together, or none of it does.

        Raises:
            OSError: if it cannot be written.
        """
        run = self.connection.execute
        with self.errors("written"):
            run("BEGIN IMMEDIATE")
            try:
                yield
                run("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    run("ROLLBACK")
                raise

    def fact(self, name: str) -> bytes | None:
        """A value by name.

        Raises:
            DamagedError: if it is not what was put.
        """
        with self.errors("read"):
            row = self.connection.execute(
                "SELECT value FROM facts WHERE name=?", (name,)
            ).fetchone()
        if row is None:
            return None
        value, stored = bytes(row[0][:-8]), bytes(row[0][-8:])
        if checksum(name, value) != stored:
            raise DamagedError(
                f"{self.path}: the fact {name!r} is not what was written; restore the file from a "
                "copy"
            )
        return value

    def need(self, name: str) -> bytes:
        """A value that must be there.

        Raises:
            DamagedError: if it is not, or is not what was put.
        """
        value = self.fact(name)
        if value is None:
            raise DamagedError(f"{self.path} has no fact {name!r}; restore it from a copy")
        return value

    def put_fact(self, name: str, value: bytes) -> None:
        """Sets a value by name."""
        self.connection.execute(
            "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value=excluded.value",
            (name, value + checksum(name, value)),
        )

    def drop_fact(self, name: str) -> None:
        """Takes a value by name away, if it is there."""
        self.connection.execute("DELETE FROM facts WHERE name=?", (name,))

    def close(self) -> None:
        """Closes the file."""
        self.connection.close()


@contextmanager
def sqlite_errors(path: Path, what: str) -> Iterator[None]:
    """Errors of SQLite as those of the disk, or of what is on it."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        # a table that is not there, or a text that is none, which comes without a code
        wrong = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
        if isinstance(error, sqlite3.OperationalError) and not wrong:
            raise OSError(f"{path} cannot be {what}: {error}") from error
        raise DamagedError(
            f"{path} is not what was written: {error}; restore it from a copy"
        ) from error
