"""Records of states in the file of a shard's log: what is copied fits together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from everlong.server.store.log import Id
from everlong.server.store.sqlite_log import SqliteReader
from everlong.server.store.state_store import Mark

DELETED = 512
"""Rows that are looked at by one deletion: events do not wait for gigabytes to be overwritten."""

MARK = "watermark "
"""Of a model, before its name: the name of the fact with its mark."""


class SqliteStates:
    """Records in the file of a log; see :class:`~everlong.server.store.state_store.StateStore`.

    Records are written without waiting for the disk: they get there with events that follow.

    Args:
        log: the log; of a reader, only what reads can be called.
    """

    def __init__(self, log: SqliteReader) -> None:
        self._file = log.file
        self._swept: dict[str, int] = {}

    def mark(self, model: str) -> Mark | None:
        """The mark of a model; None if its records were never written to the end."""
        stored = self._file.fact(MARK + model)
        if stored is None:
            return None
        offset, _, rest = stored.partition(b" ")
        return Mark(int(offset), rest != b"incomplete")

    def records(self, model: str, size: int) -> Iterator[Sequence[tuple[Id, bytes]]]:
        """All users and records of a model, at most ``size`` at once."""
        with self._file.errors("read"):
            rows = self._file.connection.execute(
                "SELECT user_id, record FROM states WHERE model=?", (model,)
            )
            while some := rows.fetchmany(size):
                yield some

    def write(
        self, model: str, records: Sequence[tuple[Id, bytes]], mark: Mark | None = None
    ) -> None:
        """Replaces records of users, and the mark if one is given: all of it, or nothing."""
        connection = self._file.connection
        with self._lazily(), self._file.transaction():
            connection.executemany(
                "INSERT INTO states VALUES (?,?,?) "
                "ON CONFLICT DO UPDATE SET record=excluded.record",
                [(model, user_id, record) for user_id, record in records],
            )
            if mark is not None:
                text = f"{mark.offset}" if mark.complete else f"{mark.offset} incomplete"
                self._file.put_fact(MARK + model, text.encode())

    def erase(self, user_id: Id) -> None:
        """Overwrites the records of a user in all models; durable when it returns."""
        with self._file.transaction():
            self._file.connection.execute("DELETE FROM states WHERE user_id=?", (user_id,))

    def models(self) -> set[str]:
        """The models that have a record or a mark."""
        run = self._file.connection.execute
        with self._file.errors("read"):
            found = {name for (name,) in run("SELECT DISTINCT model FROM states")}
            marks = run("SELECT name FROM facts WHERE name LIKE ?", (MARK + "%",)).fetchall()
        return found | {name.removeprefix(MARK) for (name,) in marks}

    def delete_some(self, model: str) -> bool:
        """Deletes the mark of a model and some of its records; returns whether any are left."""
        run, first = self._file.connection.execute, self._swept.get(model, 0)
        with self._file.transaction():
            self._file.drop_fact(MARK + model)
            run(
                "DELETE FROM states WHERE rowid BETWEEN ? AND ? AND model=?",
                (first, first + DELETED - 1, model),
            )
            (last,) = run("SELECT COALESCE(MAX(rowid), 0) FROM states").fetchone()
        self._swept[model] = first + DELETED
        if first + DELETED <= last:
            return True
        del self._swept[model]
        return False

    @contextmanager
    def _lazily(self) -> Iterator[None]:
        """A block whose writes do not wait for the disk."""
        run = self._file.connection.execute
        run("PRAGMA synchronous=NORMAL")
        try:
            yield
        finally:
            run("PRAGMA synchronous=FULL")
